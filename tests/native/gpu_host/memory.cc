#include "memory.h"

#include <algorithm>
#include <utility>

namespace mk::host {

Clocks::Clocks(size_t waves)
    : waves_(waves),
      known_(waves * waves, 0),
      heard_(waves * waves, 0),
      released_(waves, 0),
      tales_(waves, 0),
      teller_(1, 0),
      last_told_(waves, 0),
      last_heard_(waves * waves, 0) {
  for (size_t i = 0; i < waves; i++) advance(i);
}

void Clocks::advance(size_t wave) {
  heard_[wave * waves_ + wave] = ++known_[wave * waves_ + wave];
  last_told_[wave] = 0;
}

void Clocks::come(size_t wave, Met& met) {
  advance(wave);
  for (auto [to, table] : {std::pair{&met.known, &known_}, std::pair{&met.heard, &heard_}}) {
    to->resize(waves_);
    for (size_t of = 0; of < waves_; of++) (*to)[of] = std::max((*to)[of], (*table)[wave * waves_ + of]);
  }
}

void Clocks::go_on(size_t wave, const Met& met) {
  for (auto [from, table] : {std::pair{&met.known, &known_}, std::pair{&met.heard, &heard_}}) {
    for (size_t of = 0; of < waves_; of++) (*table)[wave * waves_ + of] = std::max((*table)[wave * waves_ + of], (*from)[of]);
  }
  last_told_[wave] = 0;
}

void Clocks::release(size_t wave) {
  advance(wave);
  for (size_t of = 0; of < waves_; of++) released_[of] = std::max(released_[of], known(wave, of));
}

void Clocks::acquire(size_t wave) {
  for (size_t of = 0; of < waves_; of++) {
    if (of == wave) continue;
    u32 &known = known_[wave * waves_ + of], &heard = heard_[wave * waves_ + of];
    known = std::max(known, released_[of]);
    heard = std::max(heard, known);
  }
  last_told_[wave] = 0;
}

u32 Clocks::tell(size_t wave) {
  if (last_told_[wave] == 0) {
    last_told_[wave] = static_cast<u32>(teller_.size());
    teller_.push_back(static_cast<u32>(wave));
    tales_.resize(tales_.size() + waves_);
    std::copy_n(&heard_[wave * waves_], waves_, tales_.end() - static_cast<i64>(waves_));
  }
  return last_told_[wave];
}

void Clocks::hear(size_t wave, u32 tale) {
  u32& last = last_heard_[wave * waves_ + teller_[tale]];
  if (last >= tale) return;
  last = tale;
  for (size_t of = 0; of < waves_; of++) {
    u32& heard = heard_[wave * waves_ + of];
    if (of != wave) heard = std::max(heard, tales_[tale * waves_ + of]);
  }
  last_told_[wave] = 0;
}

Words::Words(const Options& options, size_t units, size_t waves, Clocks& clocks, Random& random, Statistics& statistics)
    : options_(options),
      clocks_(clocks),
      random_(random),
      statistics_(statistics),
      waiting_(units),
      acquired_(waves, 0) {
  for (u64 i = 0; i < options.region_count; i++) {
    const Region& region = options.regions[i];
    if (!region.writable) continue;
    const u64 words = (region.bytes + 3) / 4;  // the last one may have some bytes of what follows
    areas_.push_back({region.begin, region.begin + 4 * words, count_});
    count_ += words;
  }
  if (areas_.empty()) areas_.push_back({});
  last_ = areas_.data();
  views_ = zeroed<View>(units * count_);
  versions_ = zeroed<u32>(units * count_);
  words_ = zeroed<Word>(count_);
}

u32 Words::load(const u32* p, size_t i, size_t unit, size_t wave) {
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
  if (word.tale) clocks_.hear(wave, word.tale);
  return *p;
}

void Words::store(u32* p, size_t i, u32 value, size_t unit, size_t wave) {
  statistics_.stores++;
  u64 due = delay();
  const Fault& fault = options_.fault;
  const char* at = reinterpret_cast<const char*>(p);
  const bool counts = fault.watched == Watched::kAll || (fault.watched == Watched::kZero) == (value == 0);
  if (counts && at >= fault.begin && at < fault.end && statistics_.watched++ == fault.nth && fault.kind != FaultKind::kNone) {
    statistics_.faults++;
    if (fault.kind == FaultKind::kDrop) return;
    if (fault.kind == FaultKind::kHold) due = kHeld;
    if (fault.kind == FaultKind::kFlip) value ^= 1;
    if (fault.kind == FaultKind::kLag) due = kLagging;
  }
  View& view = views_[unit * count_ + i];
  if (view.waiting) due = std::max(due, view.last_due);
  const Store store{due, p, i, value, static_cast<u32>(wave), clocks_.now(wave), geometry.checked ? clocks_.tell(wave) : 0};
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

bool Words::claim(u32* p, size_t i) {
  if (*p != 0) return false;
  words_[i] = {statistics_.steps, 0, words_[i].version + 1, 0};
  *p = 1;
  news_++;
  return true;
}

u32 Words::add(u32* p, size_t i, u32 value) {
  const u32 before = *p;
  words_[i] = {statistics_.steps, before, words_[i].version + 1, 0};
  *p = before + value;
  news_++;
  return before;
}

void Words::make_visible(size_t unit, const Store& store) {
  Word& word = words_[store.word];
  word = {statistics_.steps, *store.p, word.version + 1, store.tale};
  versions_[unit * count_ + store.word] = word.version;
  *store.p = store.value;
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

void Words::settle_due() {
  next_due_ = kNever;
  for (size_t unit = 0; unit < waiting_.size(); unit++) {
    settle_unit<true>(unit, [this](const Store& store) { return store.due <= statistics_.steps; });
    for (const Store& store : waiting_[unit]) next_due_ = std::min(next_due_, store.due);
  }
}

void Words::settle_some() {
  for (size_t unit = 0; unit < waiting_.size(); unit++) {
    settle_unit<false>(unit, [this](const Store& store) { return store.due != kHeld && store.due != kLagging && random_.one_in(2); });
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
