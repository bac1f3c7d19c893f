// The entry: a whole decode in one launch. docs/kernel.md names the phases and hand-offs.
#pragma once

#include "phases/attention.h"
#include "phases/head.h"
#include "phases/reduce.h"
#if defined(MK_REGISTER_RING)
#include "stream_walk.h"
#else
#include "stream_loops.h"
#endif

namespace mk {

// Copies what the caller gave for each request, by every unit for itself.
MK_DEVICE void start_requests(Service& s) {
  Control& c = s.control();
  if (s.index == 0) c.aborted = 0;
  if (s.index < kBatch) {
    const int r = s.index;
    // Words, as the owner of a request may be at its end already.
    c.position[r] = (int)arch::load_word((const u32*)s.args.position + r);
    c.token[r] = (int)arch::load_word((const u32*)s.args.last_token + r);
    c.status[r] = (int)arch::load_word((const u32*)s.args.status + r);
    c.emitted[r] = 0;
    c.limit[r] = smaller(s.args.max_new_tokens, s.args.row_max_new_tokens[r]);
    c.filtered[r] = row_options(s.args, r, 0).filtered;
    const bool valid = c.position[r] >= 0 && c.token[r] >= 0 && c.token[r] < kVocab;
    update_live(s, r);
    if (!valid) {
      // A request that is not running may hold anything; nothing of it is written back.
      if (c.status[r] == kRunning && s.unit == owner_of(r) && arch::claim(s.at<u32>(kWorkspace.abort) + 1)) {
        s.args.report->unit = (u32)r;
        s.args.report->expected = (u32)c.position[r];
        s.args.report->seen = (u32)c.token[r];
        s.args.report->reason = kInvalid;
      }
      c.position[r] = 0;
      c.token[r] = 0;
      c.live[r] = 0;
      c.status[r] = kInvalidRequest;
    }
  }
  for (int request = 0; request < kBatch; request++) {
    if (owner_of(request) != s.unit) continue;
    for (int i = s.index; i < s.args.max_new_tokens; i += kServiceLanes) {
      s.args.tokens[(i64)request * s.args.max_new_tokens + i] = -1;
      if (s.args.log_probs != nullptr) s.args.log_probs[(i64)request * s.args.max_new_tokens + i] = 0.0f;
    }
  }
  s.sync();
}

MK_DEVICE void finish_requests(Service& s, bool cancelled) {
  const Control& c = s.control();
  const int r = s.index;
  if (r >= kBatch || owner_of(r) != s.unit) return;
  s.args.lengths[r] = c.emitted[r];
  if (c.status[r] != kInvalidRequest) {
    const bool full = wants_more(s, r) && c.position[r] >= s.args.capacity;
    arch::store_word((u32*)s.args.position + r, (u32)c.position[r]);
    arch::store_word((u32*)s.args.last_token + r, (u32)c.token[r]);
    arch::store_word((u32*)s.args.status + r, (u32)(full ? kFull : c.status[r]));
  }
  if (r == 0 && cancelled && arch::claim(s.at<u32>(kWorkspace.abort) + 1)) s.args.report->reason = kCancelled;
}

// Stream waves that gather need not wait while the service waves are busy with something else before a phase.
template <int phase>
MK_DEVICE bool opens_early(const Service& s) {
  if (!kStreamGathers || kTiles[phase * MK_UNITS + s.unit].count == 0) return false;
  arch::open_gate();  // A
  return true;
}

// p3 and p5. opened: the first gate is open already. Returns whether that of the next phase is.
template <int phase>
MK_DEVICE bool project(Service& service, int layer, bool opened) {
  auto open_next = [&] {
    return phase == kO                    ? opens_early<kGateUp>(service)
           : layer == MK_NUM_LAYERS - 1 ? opens_early<kHead>(service)
                                        : opens_early<kQkv>(service);
  };
  if constexpr (kGroups > 1) {
    run_phase<phase>(service, layer, opened, Nothing{}, [&](Service& s, const Tiles& deal, int segment, float, auto wait) {
      publish_sums<phase>(s, layer, deal, segment, wait);
    });
    const bool next = open_next();
    renew(service, [&](Service& s) { reduce_sums<phase>(s, layer); });
    return next;
  } else if constexpr (kPacked) {
    float squares = 0.0f;
    run_phase<phase>(service, layer, opened, Nothing{}, [&](Service& s, const Tiles& deal, int segment, float, auto wait) {
      publish_residual<phase>(s, layer, deal, segment, squares, wait);
    });
    const bool next = open_next();
    if (kAllHaveRows || kTiles[phase * MK_UNITS + service.unit].count > 0) publish_squares<phase>(service, layer, squares);
    return next;
  } else {
    run_phase<phase>(service, layer, opened, Nothing{}, [&](Service& s, const Tiles& deal, int segment, float scale, auto wait) {
      publish_rows<phase>(s, layer, deal, segment, scale, wait);
    });
    return false;
  }
}

// opened: the first gate is open already. Returns whether that of the next layer or of the head is.
MK_DEVICE bool run_layer(Service& service, int layer, bool opened) {
  renew(service, [&](Service& s) { s.enter_layer(layer); });
  CacheLoads loads;
  run_phase<kQkv>(
      service, layer, opened,
      [&](Service& s) {
        if constexpr (!arch::kRenew && !kCopiesCache) start_first_task(s, layer, loads);
      },
      [&](Service& s, const Tiles& deal, int segment, float scale, auto wait) { publish_rows<kQkv>(s, layer, deal, segment, scale, wait); });
  renew(service, [&](Service& s) {
    if constexpr (arch::kRenew || kCopiesCache) start_first_task(s, layer, loads);
    p2_attend(s, layer, loads);
    p2_combine(s, layer);
  });
  // Its gate was not opened before: looks in vain for what o multiplies would hold up attention, and attention's scratch and copies of
  // keys and values are where that goes.
  opened = project<kO>(service, layer, false);
  if constexpr (kPostNorm) {
    renew(service, [&](Service& s) {
      add_projection<aligned_in_layer(MK_ATTN_POST_NORM)>(
          s, s.site(h4_projected, s.part<kGroups>(kWorkspace.projected, kHidden), layer), s.constants + MK_ATTN_POST_NORM);
    });
  }
  run_phase<kGateUp>(service, layer, opened, Nothing{}, [&](Service& s, const Tiles& deal, int segment, float scale, auto wait) {
    publish_inner(s, layer, deal, segment, scale, wait);
  });
  opened = kPacked && opens_early<kDown>(service);
  // What this lane has cleared of packed hand-offs is cleared before it writes them for the next time.
  if constexpr (kPacked) arch::release();
  opened = project<kDown>(service, layer, opened);
  if constexpr (kPostNorm) {
    renew(service, [&](Service& s) {
      add_projection<aligned_in_layer(MK_MLP_POST_NORM)>(s, s.residual_site(layer), s.constants + MK_MLP_POST_NORM);
    });
  }
  return opened;
}

// opened: as of run_layer.
MK_DEVICE void p6_head(Service& service, bool opened) {
  Search search;
  if (!opened) opened = opens_early<kHead>(service);
  renew(service, [&](Service& s) { search = start_search(s); });
  run_phase<kHead>(service, MK_NUM_LAYERS, opened, Nothing{}, [&](Service& s, const Tiles& deal, int segment, float scale, auto wait) {
    search_logits(s, search, deal, segment, scale, wait);
  });
  renew(service, [&](Service& s) { publish_candidates(s, search); });
}

// Returns false when no request is live any more, or nobody wants the rest.
MK_DEVICE bool start_token(Service& s, bool cancelled) {
  if (s.index == 0) {
    Control& c = s.control();
    bool any = false;
    for (int r = 0; r < kBatch; r++) any |= c.live[r] != 0;
    c.go[s.token & 1] = any && !cancelled && !s.waiter.aborted && !(kStreamGathers && c.aborted != 0);
  }
  arch::open_gate();  // T
  arch::take_over();
  return arch::shared_number(&s.control().go[s.token & 1]) != 0;
}

MK_DEVICE void serve(const Args& args) {
  Service service(args);
#if MK_WAVE_SIZE == 32
  make_cache_barriers(service);
#endif
  renew(service, [](Service& s) { start_requests(s); });
  bool cancelled = false, go;
  do {
    renew(service, [&](Service& s) { go = start_token(s, cancelled); });
    if (go) {
      bool opened = opens_early<kQkv>(service);
      renew(service, [&](Service& s) {
        fill_angles(s);
        start_residual(s);
      });
      service.mark(kTokenStart);
      for (int layer = 0; layer < MK_NUM_LAYERS; layer++) opened = run_layer(service, layer, opened);
      p6_head(service, opened);
      renew(service, [&](Service& s) { cancelled = !p7_sample(s); });
      service.token++;
      go = arch::fresh_truth(go);  // not kept for all of a token
    }
  } while (go);
  renew(service, [&](Service& s) { finish_requests(s, cancelled); });
}

}  // namespace mk

MK_KERNEL(mk::kThreads) void monokernel(mk::Args args) {
  mk::arch::enter();
#if MK_NEAR || defined(MK_PLACED)
  if (!mk::find_place(args)) return;
#endif
#if defined(MK_FEED_WAVE)
  const bool feeds = mk::arch::wave() == mk::kWaves + mk::kServiceWaves;
  if (feeds) {
    *mk::shared_at<mk::u32>(mk::kShared.stop) = 0;
    if (mk::arch::lane() == 0) mk::arch::make_meeting();
    mk::Ring::make_barriers(mk::shared_at<char>(mk::kShared.barriers));
  }
  mk::arch::unit_sync();
#endif
  if (mk::arch::wave() < mk::kWaves) {
    mk::arch::divide_registers<true, mk::kStreamRegisters>();
    mk::StreamWave stream;
    stream.run(args);
    return;
  }
  mk::arch::divide_registers<false, mk::kStreamRegisters>();
#if defined(MK_FEED_WAVE)
  if (feeds) {
    mk::feed(args);
    return;
  }
#endif
  mk::serve(args);
}
