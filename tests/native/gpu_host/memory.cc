#include "memory.h"

#include <algorithm>

namespace mk::host {

void Clocks::join(size_t first, u64 members) {
  std::vector<u32> most(waves_, 0);
  for (u64 left = members; left; left &= left - 1) {
    const size_t wave = first + static_cast<size_t>(__builtin_ctzll(left));
    advance(wave);
    for (size_t of = 0; of < waves_; of++) most[of] = std::max(most[of], known(wave, of));
  }
  for (u64 left = members; left; left &= left - 1) {
    const size_t wave = first + static_cast<size_t>(__builtin_ctzll(left));
    std::copy(most.begin(), most.end(), known_.begin() + static_cast<i64>(wave * waves_));
  }
}

void Clocks::release(size_t wave) {
  advance(wave);
  for (size_t of = 0; of < waves_; of++) released_[of] = std::max(released_[of], known(wave, of));
}

void Clocks::acquire(size_t wave) {
  for (size_t of = 0; of < waves_; of++) {
    u32& known = known_[wave * waves_ + of];
    if (of != wave) known = std::max(known, released_[of]);
  }
}

Words::Words(const Options& options, size_t units, size_t waves, Clocks& clocks, Random& random, Statistics& statistics)
    : options_(options),
      clocks_(clocks),
      random_(random),
      statistics_(statistics),
      count_(options.workspace_bytes / 4),
      waiting_(units),
      acquired_(waves, 0),
      views_(zeroed<View>(units * count_)),
      versions_(zeroed<u32>(units * count_)),
      words_(zeroed<Word>(count_)) {}

u32 Words::load(const u32* p, size_t unit, size_t wave) {
  const size_t i = index(p);
  const View& view = views_[unit * count_ + i];
  if (view.waiting) return view.value;
  const Word& word = words_[i];
  u32& seen = versions_[unit * count_ + i];
  if (seen != word.version) {
    // A load may have been made earlier than its place in the program says, but not before an acquire or an older load.
    constexpr u64 kSteps = 64;
    if (options_.stores != Stores::kNow && word.step > acquired_[wave] && statistics_.steps - word.step < kSteps &&
        random_.one_in(4)) {
      statistics_.stale++;
      seen = word.version - 1;
      return word.previous;
    }
    seen = word.version;
  }
  return *p;
}

void Words::store(u32* p, u32 value, size_t unit, size_t wave) {
  const size_t i = index(p);
  statistics_.stores++;
  u64 due = delay();
  const Fault& fault = options_.fault;
  if (fault.kind != FaultKind::kNone && i * 4 >= fault.begin && i * 4 < fault.end && fault_count_++ == fault.nth) {
    statistics_.faults++;
    if (fault.kind == FaultKind::kDrop) return;
    if (fault.kind == FaultKind::kHold) due = kHeld;
    if (fault.kind == FaultKind::kFlip) value ^= 1;
  }
  View& view = views_[unit * count_ + i];
  if (view.waiting) due = std::max(due, view.last_due);
  const Store store{due, i, value, static_cast<u32>(wave), clocks_.now(wave)};
  if (due <= statistics_.steps && !view.waiting) {
    make_visible(unit, store);
    return;
  }
  statistics_.delayed++;
  view.value = value;
  view.last_due = due;
  view.waiting++;
  waiting_[unit].push_back(store);
  next_due_ = std::min(next_due_, due);
}

u64 Words::delay() {
  switch (options_.stores) {
    case Stores::kNow:
      return 0;
    case Stores::kLate:
      return kNever;
    case Stores::kRandom:
      break;
  }
  const u64 kind = random_.below(8);
  return statistics_.steps + (kind < 2 ? 0 : kind < 7 ? random_.below(32) : random_.below(512));
}

bool Words::claim(u32* p) {
  if (*p != 0) return false;
  const size_t i = index(p);
  words_[i] = {statistics_.steps, 0, words_[i].version + 1};
  *p = 1;
  news_++;
  return true;
}

void Words::make_visible(size_t unit, const Store& store) {
  u32* p = reinterpret_cast<u32*>(options_.workspace) + store.word;
  Word& word = words_[store.word];
  word = {statistics_.steps, *p, word.version + 1};
  versions_[unit * count_ + store.word] = word.version;
  *p = store.value;
  news_++;
}

// Makes those stores of a unit visible for which due(store) holds and that no earlier one to the same word keeps back.
// in_order: a later store to a word is never due before an earlier one.
template <bool in_order, typename Due>
void Words::settle_unit(size_t unit, Due due) {
  std::vector<Store>& stores = waiting_[unit];
  std::vector<size_t> kept;  // words
  size_t end = 0;
  for (size_t i = 0; i < stores.size(); i++) {
    const Store store = stores[i];
    if (due(store) && (in_order || std::find(kept.begin(), kept.end(), store.word) == kept.end())) {
      views_[unit * count_ + store.word].waiting--;
      make_visible(unit, store);
    } else {
      if (!in_order) kept.push_back(store.word);
      stores[end++] = store;
    }
  }
  stores.resize(end);
}

void Words::join(size_t first, u64 members) {
  u64 most = 0;
  for (u64 left = members; left; left &= left - 1) most = std::max(most, acquired_[first + static_cast<size_t>(__builtin_ctzll(left))]);
  for (u64 left = members; left; left &= left - 1) acquired_[first + static_cast<size_t>(__builtin_ctzll(left))] = most;
}

void Words::settle_due() {
  next_due_ = kNever;
  for (size_t unit = 0; unit < waiting_.size(); unit++) {
    settle_unit<true>(unit, [this](const Store& store) { return store.due <= statistics_.steps; });
    for (const Store& store : waiting_[unit]) next_due_ = std::min(next_due_, store.due);
  }
}

void Words::settle_some() {
  for (size_t unit = 0; unit < waiting_.size(); unit++) {
    settle_unit<false>(unit, [this](const Store& store) { return store.due != kHeld && random_.one_in(2); });
  }
}

void Words::settle_all() {
  for (size_t unit = 0; unit < waiting_.size(); unit++) {
    settle_unit<true>(unit, [](const Store& store) { return store.due != kHeld; });
  }
}

void Words::release(size_t unit, size_t wave) {
  settle_unit<false>(unit, [this, wave](const Store& store) {
    return store.due != kHeld && (store.wave == wave || store.clock < clocks_.known(wave, store.wave));
  });
}

}  // namespace mk::host
