// Where units are. With MK_NEAR, words that stay inside a group go no further than the cache that the units of one die share, so
// all units of a group must be on one: a work-group takes the next free number of its die's group. If there is none, on any die,
// every unit leaves before it has done anything, and the host launches the kernel without MK_NEAR.
#pragma once

#include "sync/words.h"

#if MK_NEAR

namespace mk {

// By all waves, once. False: the unit is to leave.
MK_DEVICE bool find_place(const Args& args) {
  int* place = shared_at<int>(kShared.place);
  if (arch::wave() == 0) {
    // h12: how many units have looked, and << 16 how many of them have found no number.
    u32* looked = (u32*)((char*)args.workspace + kWorkspace.places);
    u32* taken = looked + 32;  // [kGroups] lines
    if (arch::lane() == 0) {
      const u32 die = arch::die();
      const u32 number = die < (u32)kGroups ? arch::add(taken + die * 32, 1) : (u32)kMembers;
      const bool found = number < (u32)kMembers;
      place[0] = found ? (int)(die * kMembers + number) : arch::unit();
      place[1] = 0;
      arch::add(looked, found ? 1u : 1u | 1u << 16);
    }
    arch::wave_sync();
    Waiter waiter = {&args, (u32*)((char*)args.workspace + kWorkspace.abort), 0, false};
    const Site site = {looked, h12_places, 0, 0, 0};
    u32 seen = arch::load_word(looked);
    for (int spins = 1; (seen & 0xffffu) != MK_UNITS; spins++) {
      if (spins % kSpinsBetweenLooks == 0 && give_up(waiter, site, 0, seen, spins == kSpinsBetweenLooks)) break;
      seen = arch::load_word(looked);
    }
    if (arch::lane() == 0) {
      place[1] = seen == MK_UNITS;
      if (!waiter.aborted && seen != MK_UNITS && arch::claim(waiter.abort)) {
        args.report->expected = MK_UNITS;
        args.report->seen = seen;
        args.report->reason = kMisplaced;
      }
    }
  }
  arch::unit_sync();
  return arch::shared_number(place + 1) != 0;
}

}  // namespace mk

#endif  // MK_NEAR
