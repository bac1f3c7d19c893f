// p6_head and p7_sample: logits, the choice of a token, and the end of a request.
#pragma once

#include "phases/filters.h"
#include "phases/layer.h"
#include "phases/sampling.h"

namespace mk {

// The unit that chooses a request's token and writes its results.
MK_DEVICE int owner_of(int request) { return request * MK_UNITS / kBatch; }

constexpr int kPackedLanes = kServiceLanes / kTileRows;  // groups of lanes that look at the rows of one tile
static_assert(kPackedCandidate < kCandidateWords, "one word is for flags");
static_assert(kPackedLanes / kBatch <= arch::kWave, "a wave must hold all candidates of a request");

enum Flags : u32 { kEmitted = 1, kStop = 2, kCancel = 4, kAborted = 8 };  // in h8, the last two also in h7

// A filtered request's logits, [vocab]: after penalties, bias and temperature; as they were computed.
MK_DEVICE u32* adjusted_row(const Service& s, int request) {
  return s.at<u32>(kWorkspace.adjusted) + (i64)request * line(kVocab);
}
MK_DEVICE u32* logits_row(const Service& s, int request) {
  return s.at<u32>(kWorkspace.logits) + (i64)request * line(kVocab);
}

// Once a token, so its code is never in the instruction cache: small is fast. Gives all lanes the same.
MK_DEVICE void merge_wave(Candidate& c) {
  if (!arch::any(!(c.sum == 0.0f) || !(c.mass == 0.0f))) {
    // Floats as integers of the same order; equal ones, zeros of both signs too, become equal.
    const u32 bits = arch::as_u32(c.best.score + 0.0f), score = bits >> 31 ? ~bits : bits | 0x80000000u;
    const u32 highest = arch::wave_max(score);
    const u32 token = ~arch::wave_max(score == highest ? ~(u32)c.best.token : 0u);  // the lowest
    const bool wins = score == highest && (u32)c.best.token == token;
    c.raw = arch::as_f32(arch::wave_max(wins ? arch::as_u32(c.raw) : 0u));
    c.best = {arch::as_f32(highest >> 31 ? highest & 0x7fffffffu : ~highest), (i32)token};
    return;
  }
  MK_NO_UNROLL
  for (int mask = 1; mask < arch::kWave; mask *= 2) merge_lanes(c, mask);
}

// What a lane finds in its rows of the head, which are all of one request.
struct Search {
  int request;
  u32 cancel;  // what was found in the host's memory
  RowOptions options;
  Candidate best;
};

MK_DEVICE Search start_search(const Service& s) {
  Search search;
  // Unit 0 passes a user's interrupt on to the owner of every request. Asked for now and not looked at before the end of the
  // phase: the host's memory is microseconds away.
  search.cancel = 0;
  if (s.unit == 0 && s.lane == 0) search.cancel = arch::load_host(s.args.cancel);
  search.request = s.index % (kBatch * kTileRows) / kTileRows;
  search.options = row_options(s.args, search.request, s.control().position[search.request]);
  search.best = no_candidate();
  return search;
}

// p6, for each segment.
template <typename Wait>
MK_DEVICE void search_logits(Service& s, Search& search, const Tiles& deal, int segment, float scale, Wait wait) {
  const int request = search.request;
  if constexpr (arch::kRenew) search.options = row_options(s.args, request, s.control().position[request]);
  const RowOptions& options = search.options;
  for_products<kTileRows>(
      s, deal, segment, wait, [](int, int) { return 0; },
      [&](int, int token, auto sum) {
        if (token >= kVocab) {
          // Filters look at whole vectors.
          if (token < round_up(kVocab, 4) && options.filtered) arch::store_word(adjusted_row(s, request) + token, 0);
          return;
        }
        float raw = sum(0) * scale * MK_LOGIT_MULTIPLIER;
        if constexpr (MK_LOGIT_SOFTCAP > 0.0f) raw = soft_cap(raw, MK_LOGIT_SOFTCAP);
        const float z = adjust(options, s.args, request, token, raw);
        offer(search.best, options, token, raw, z);
        if (options.filtered) {
          arch::store_word(adjusted_row(s, request) + token, arch::as_u32(z));
          if (options.wants_log_prob) arch::store_word(logits_row(s, request) + token, arch::as_u32(raw));
        }
      });
}

// The end of p6: one candidate of this unit for each request.
MK_DEVICE void publish_candidates(Service& s, Search& search) {
  const u32 parity = s.token_site(h7_candidate, kWorkspace.candidate).parity;
  Candidate& best = search.best;
  s.mark(kCandidates);
  // Neighbouring lanes that have the same request, then all that have it.
  constexpr int group = kBatch == 1 ? arch::kWave : kTileRows;
  if constexpr (kBatch == 1) {
    merge_wave(best);
  } else {
    MK_NO_UNROLL
    for (int mask = 1; mask < group; mask *= 2) merge_lanes(best, mask);
  }
  u32(*packed)[kPackedCandidate] = shared_at<u32[kPackedCandidate]>(kShared.sampling);
  if (s.index % group == 0) pack(best, packed[s.index / group]);
  s.sync();
  constexpr int used = kServiceLanes / (kBatch * group);  // groups of each request
  for (int r = s.wave; r < kBatch; r += kServiceWaves) {
    Candidate c = no_candidate();
    if (s.lane < used) c = unpack(packed[s.lane * kBatch + r]);
    merge_wave(c);
    u32 words[kPackedCandidate];
    pack(c, words);
    if (s.lane == 0) {
      // Whoever owns a filtered request reads all adjusted logits.
      if (s.control().filtered[r]) arch::release();
      u32* to = s.at<u32>(kWorkspace.candidate) + (r * MK_UNITS + s.unit) * kCandidateWords;
      MK_UNROLL
      for (int i = 0; i < kPackedCandidate; i++) arch::store_word(to + i, encode_int(words[i], parity));
      arch::store_word(to + kPackedCandidate, encode_int((search.cancel != 0 ? kCancel : 0) | (kStreamGathers && s.control().aborted != 0 ? kAborted : 0), parity));
      for (int i = kPackedCandidate + 1; i < kCandidateWords; i++) arch::store_word(to + i, encode_int(0, parity));
    }
  }
  s.sync();
}

// By the owner: joins what the units found.
MK_DEVICE Candidate gather_candidates(Service& s, int request, u32* flags) {
  const Site site = s.token_site(h7_candidate, kWorkspace.candidate);
  Candidate best = no_candidate();
  *flags = 0;
  // Two vectors a unit, dealt to the lanes one by one and asked for together; then a lane swaps one with its neighbour for the
  // other half of what it keeps.
  constexpr int vectors = 2 * MK_UNITS, rounds = round_up((vectors + arch::kWave - 1) / arch::kWave, 2), at_once = smaller(rounds, 10);
  const bool odd = s.lane % 2 != 0;
  MK_NO_UNROLL
  for (int first = 0; first < rounds; first += at_once) {
    Vec4 v[at_once];
    const int own = first * arch::kWave + s.lane;
    wait_words<at_once>(s.waiter, site, site.words + request * MK_UNITS * kCandidateWords + own * 4, arch::kWave * 4, v,
                        [&](int i) { return own + i * arch::kWave < vectors ? 4 : 0; });
    MK_UNROLL
    for (int i = 0; i < at_once; i += 2) {
      const Vec4 given = odd ? v[i] : v[i + 1];
      const Vec4 got = {arch::shuffle_xor(given.x, 1), arch::shuffle_xor(given.y, 1), arch::shuffle_xor(given.z, 1),
                        arch::shuffle_xor(given.w, 1)};
      const Vec4 low = odd ? got : v[i], high = odd ? v[i + 1] : got;
      const u32 words[kPackedCandidate] = {decode_int(low.x), decode_int(low.y), decode_int(low.z),
                                           decode_int(low.w), decode_int(high.x), decode_int(high.y)};
      if (own + (i + odd) * arch::kWave < vectors) {
        merge(best, unpack(words));
        *flags |= decode_int(high.z);
      }
    }
  }
  merge_wave(best);
  *flags = (arch::any((*flags & kCancel) != 0) ? kCancel : 0) | (arch::any((*flags & kAborted) != 0) ? kAborted : 0);
  return best;
}

// Lets the host know, if it wants to, after all units do. Two words that say themselves that they are there, so that nothing waits
// for their order: the token above its log-probability, with a bit that is always set, and the time, which is never 0.
MK_DEVICE void mail(const Service& s, int request, int emitted, i32 token, float log_prob) {
  if (s.args.mailbox == nullptr) return;
  u64* to = s.args.mailbox + ((i64)request * s.args.max_new_tokens + emitted) * 2;
  arch::store_host(to, (u64)(1u << 31 | (u32)token) << 32 | arch::as_u32(log_prob));
  arch::store_host(to + 1, arch::wall_clock() | 1u);
}

// By the service waves of the owner.
MK_DEVICE void choose(Service& s, int request) {
  const Control& control = s.control();
  const bool live = control.live[request] != 0;
  const bool filtered = control.filtered[request] && live;
  Candidate best = no_candidate();
  u32 flags = 0;
  const i32 eos = first_eos(s.args, request, s.lane);  // on its way while the candidates are not there
  Candidate* shared_best = shared_at<Candidate>(kShared.sampling);
  if (s.wave == 0) {
    best = gather_candidates(s, request, &flags);
    if (s.lane == 0) *shared_best = best;
  }
  if (filtered) {
    s.sync();
    arch::acquire();
    best = *shared_best;
    s.sync();  // the scratch is free
    const Service now = s.renewed();
    const RowOptions options = row_options(now.args, request, control.position[request]);
    best.best.token = sample_filtered<kServiceGroup>(options, best, (const float*)adjusted_row(now, request),
                                                     shared_at<char>(kShared.sampling), now.index);
    if (options.wants_log_prob) best.raw = arch::as_f32(arch::load_word(logits_row(s, request) + best.best.token));
    s.sync();
  }
  if (s.wave == 0) {
    const u32 parity = s.token_site(h8_token, kWorkspace.token).parity;
    i32 token = best.best.token;
    token = token >= 0 && token < kVocab ? token : 0;  // after an aborted wait it may be anything
    const bool emits = live && !s.waiter.aborted && (flags & kAborted) == 0;
    if (emits) flags |= kEmitted;
    if (arch::any(emits && is_eos(s.args, request, token, eos, s.lane))) flags |= kStop;
    float chance = 0.0f;
    if (emits && s.lane == 0) {
      const i64 place = (i64)request * s.args.max_new_tokens + control.emitted[request];
      s.args.tokens[place] = token;
      if (s.args.log_probs != nullptr) s.args.log_probs[place] = chance = log_prob(best.raw, best.top, best.sum);
    }
    u32* to = s.at<u32>(kWorkspace.token) + request * line(kTokenWords);
    if (s.lane < kTokenWords) arch::store_word(to + s.lane, encode_int(s.lane == 0 ? (u32)token : s.lane == 1 ? flags : 0, parity));
    if (emits && s.lane == 0) mail(s, request, control.emitted[request], token, chance);
  }
  s.sync();
}

MK_DEVICE void mark_seen(const Service& s, int request, int token) {
  const Tiles head = kTiles[kHead * MK_UNITS + s.unit];
  const int tile = token / kTileRows;
  if (tile < head.begin || tile >= head.begin + head.count) return;
  u8* at = s.args.seen + (i64)request * kVocab + token;
  arch::store_byte(at, load_seen(s.args, request, token) | 2u);
}

MK_DEVICE bool wants_more(const Service& s, int request) {
  const Control& c = s.control();
  return c.status[request] == kRunning && c.emitted[request] < c.limit[request];
}

MK_DEVICE void update_live(const Service& s, int request) {
  Control& c = s.control();
  c.live[request] = wants_more(s, request) && c.position[request] < s.args.capacity;
}

// Chooses, and lets every unit know. Returns false if the user wants the launch to end.
MK_DEVICE bool p7_sample(Service& s) {
  for (int request = 0; request < kBatch; request++) {
    if (owner_of(request) == s.unit) renew(s, [&](Service& now) { choose(now, request); });
  }
  s.mark(kChosen);
  const Site site = s.token_site(h8_token, kWorkspace.token);
  bool cancelled = false;
  if (s.wave == 0) {
    const int request = s.lane < kBatch ? s.lane : 0;
    Vec4 v[1];
    wait_words<1>(s.waiter, site, site.words + request * line(kTokenWords), 4, v, [](int) { return 4; });
    const int token = (int)decode_int(v[0].x);
    const u32 flags = decode_int(v[0].y);
    cancelled = arch::any((flags & kCancel) != 0);
    if (s.lane < kBatch && !s.waiter.aborted) {
      Control& c = s.control();
      if (flags & kEmitted) {
        mark_seen(s, request, token);
        c.position[request]++;
        c.emitted[request]++;
        c.token[request] = token;
        if (flags & kStop) c.status[request] = kStopped;
      }
      update_live(s, request);
    }
    arch::wave_sync();  // its first lane looks at all requests next
  }
  s.mark(kKnown);
  return !cancelled;
}

}  // namespace mk
