// Which wave goes on, and for how long.
#include "machine.h"

namespace mk::host {

bool Machine::looks_for_news(const Wave& wave) const {
  constexpr u32 kLooks = 12;  // more than most waits look at before they begin again
  return wave.looks > kLooks && wave.news == words.news();
}

Wave& Machine::choose() {
  candidates_.clear();
  size_t runnable = 0;
  for (Wave& wave : waves) {
    if (!wave.ready) continue;
    runnable++;
    if (!looks_for_news(wave)) candidates_.push_back(&wave);
  }
  if (runnable == 0) leave("nobody can go on:\n" + who_waits());
  Wave* next;
  if (candidates_.empty()) {
    // All look for news. Time has to pass, or what is withheld has to come.
    if (options.stores == Stores::kLate) words.settle_some();
    for (Wave& wave : waves) {
      if (wave.ready) candidates_.push_back(&wave);
    }
    next = any_of(candidates_);
    run_left_ = 1 + static_cast<i64>(random.below(16));
  } else if (options.policy == Policy::kRoundRobin) {
    next = choose_in_order();
    run_left_ = 1;
  } else if (options.policy == Policy::kRandom) {
    if (random.one_in(8)) next = &waves[random.below(waves.size())];
    else next = any_of(candidates_);
    if (!next->ready) next = any_of(candidates_);
    run_left_ = 1 + static_cast<i64>(random.below(u64{1} << random.below(6)));
  } else {
    next = choose_by_rank();
    run_left_ = 1 + static_cast<i64>(random.below(8));
  }
  next->last_step = statistics.steps;
  return *next;
}

Wave* Machine::any_of(const std::vector<Wave*>& from) { return from[random.below(from.size())]; }

// Units by turns, and the waves of each by turns.
Wave* Machine::choose_in_order() {
  const size_t count = waves.size();
  for (;;) {
    cursor_ = cursor_ + 1 == count ? 0 : cursor_ + 1;
    Wave& wave = waves[cursor_ % units.size() * geometry.waves + cursor_ / units.size()];
    if (wave.ready && !looks_for_news(wave)) return &wave;
  }
}

// A wave of the first unit in the policy's order that has something to do.
Wave* Machine::choose_by_rank() {
  auto rank = [this](const Wave& wave) -> u64 {
    const u32 unit = wave.home->index;
    switch (options.policy) {
      case Policy::kForward:
        return units.size() - unit;
      case Policy::kReverse:
        return unit;
      case Policy::kStarve:
        return unit == options.unit ? 0 : 1;
      default:  // kNewest
        return wave.last_step;
    }
  };
  u64 best = 0;
  for (const Wave* wave : candidates_) best = std::max(best, rank(*wave));
  std::vector<Wave*> first;
  for (Wave* wave : candidates_) {
    if (rank(*wave) == best) first.push_back(wave);
  }
  return any_of(first);
}

}  // namespace mk::host
