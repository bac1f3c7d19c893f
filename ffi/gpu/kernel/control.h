// What service and stream waves of a unit know of its requests and of each other.
#pragma once

#include "config.h"

namespace mk {

// Written by the service waves before the barrier that starts a token.
struct Control {
  int go[2];  // for tokens of even and of odd number; 0: the launch is over
  int position[kBatch];
  int token[kBatch];
  int status[kBatch];
  int live[kBatch];
  int emitted[kBatch];
  int limit[kBatch];     // tokens to emit at most
  int filtered[kBatch];  // not 0: a filter chooses among the logits of all units
  int aborted;           // a wave of the unit has given a wait up; not kept where service waves gather, who mostly do so together
};

static_assert(sizeof(Control) <= 64 + kBatch * 64);

enum Status : int { kRunning, kStopped, kFull, kInvalidRequest /* inside the kernel only */ };

MK_DEVICE int segment_count(const Tiles& t) { return (t.count + kSegmentTiles - 1) / kSegmentTiles; }

}  // namespace mk
