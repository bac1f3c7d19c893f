// Device memory as the units of a GPU see it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "options.h"
#include "random.h"

namespace mk::host {

// Which accesses happen before which. A wave's clock advances at every point that orders its lanes. What wave a knows of wave b
// is the last clock of b that a synchronisation has made it wait for; what it has heard of b is the last one that a word it
// read tells of. The latter does not make b's data visible, but what b read before, it has read.
class Clocks {
 public:
  explicit Clocks(size_t waves);
  u32 now(size_t wave) const { return known(wave, wave); }
  u32 known(size_t wave, size_t of) const { return known_[wave * waves_ + of]; }
  u32 heard(size_t wave, size_t of) const { return heard_[wave * waves_ + of]; }
  void advance(size_t wave);
  // What waves that come to a barrier have done and know of.
  struct Met {
    std::vector<u32> known, heard;  // [of]
  };
  void come(size_t wave, Met& met);
  void go_on(size_t wave, const Met& met);  // for a wave that has waited there
  // What `wave` has done and knows of becomes visible to those who acquire later.
  void release(size_t wave);
  void acquire(size_t wave);
  // A number for all that `wave` has heard, which a word carries to those who read it.
  u32 tell(size_t wave);
  void hear(size_t wave, u32 tale);

 private:
  size_t waves_;
  std::vector<u32> known_, heard_;    // [wave][of]
  std::vector<u32> released_;         // [of]
  std::vector<u32> tales_;            // [tale][of]
  std::vector<u32> teller_;           // [tale]
  std::vector<u32> last_told_;        // [wave]; 0: the wave has heard something since
  std::vector<u32> last_heard_;       // [wave][teller]
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Zeroed = std::unique_ptr<T[], Free>;  // memory that costs nothing before it is used
template <typename T>
Zeroed<T> zeroed(size_t count) {
  void* p = std::calloc(count ? count : 1, sizeof(T));
  if (p == nullptr) throw std::bad_alloc();
  return Zeroed<T>(static_cast<T*>(p));
}

// Words of all operands that the kernel may change. A unit sees its own stores at once, the others later: addresses in any
// order, one address in the order of its stores.
class Words {
 public:
  Words(const Options& options, size_t units, size_t waves, Clocks& clocks, Random& random, Statistics& statistics);

  static constexpr size_t kNone = ~size_t{0};

  // Number of the word at `p`, or kNone where there is none. The next words have the next numbers.
  size_t find(const void* p, u64 bytes) {
    const char* at = static_cast<const char*>(p);
    if (at < last_->begin || at + bytes > last_->end) {
      for (last_ = areas_.data(); at < last_->begin || at + bytes > last_->end; last_++) {
        if (last_ == &areas_.back()) return kNone;
      }
    }
    return last_->first + static_cast<size_t>(at - last_->begin) / 4;
  }
  // In the following, i is the number of the word at p.
  u32 load(const u32* p, size_t i, size_t unit, size_t wave);
  void store(u32* p, size_t i, u32 value, size_t unit, size_t wave);
  // What the unit has stored there last, if it was the last to do so.
  u32 own(const u32* p, size_t i, size_t unit) const {
    const View& view = views_[unit * count_ + i];
    return view.waiting ? view.value : *p;
  }
  bool claim(u32* p, size_t i);
  u32 add(u32* p, size_t i, u32 value);
  void release(size_t unit, size_t wave);
  void acquire(size_t wave) { acquired_[wave] = statistics_.steps; }
  // Of waves that meet, as in Clocks.
  void come(size_t wave, u64& met) { met = std::max(met, acquired_[wave]); }
  void go_on(size_t wave, u64 met) { acquired_[wave] = std::max(acquired_[wave], met); }
  // Stores whose time has come become visible.
  void settle() {
    if (statistics_.steps >= next_due_) settle_due();
  }
  // Some of the stores that wait become visible: with Stores::kLate nothing else makes them so, save a release.
  void settle_some();
  void settle_all();
  u64 news() const { return news_; }  // how often something became visible

 private:
  static constexpr u64 kNever = ~u64{0};
  static constexpr u64 kHeld = kNever - 1;     // by a fault: not even a release helps
  static constexpr u64 kLagging = kNever - 2;  // by a fault: only a release helps

  struct Area {
    const char *begin, *end;
    size_t first;
  };
  struct Store {
    u64 due;
    u32* p;
    size_t word;
    u32 value;
    u32 wave, clock;
    u32 tale;
  };
  struct View {  // of a word by the unit that stores it
    u64 last_due;
    u32 value;
    u32 waiting;  // stores
  };
  struct Word {
    u64 step;  // when it became visible
    u32 previous;
    u32 version;
    u32 tale;
  };

  void settle_due();
  template <bool in_order, typename Due>
  void settle_unit(size_t unit, Due due);
  void make_visible(size_t unit, const Store& store);
  u64 delay();

  const Options& options_;
  Clocks& clocks_;
  Random& random_;
  Statistics& statistics_;
  std::vector<Area> areas_;
  Area* last_;  // of find()
  size_t count_ = 0;
  std::vector<std::vector<Store>> waiting_;  // [unit], in the order of the stores
  std::vector<u64> acquired_;                // [wave], step
  Zeroed<View> views_;                       // [unit][word]
  Zeroed<u32> versions_;                     // [unit][word] that the unit has seen
  Zeroed<Word> words_;                       // [word]
  u64 next_due_ = kNever;
  u64 news_ = 0;
};

}  // namespace mk::host
