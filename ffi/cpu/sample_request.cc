// The last phase of a token for one request: choose, record, advance.
#include "cpu/job.h"
#include "cpu/sampling.h"
#include "mailbox.h"

namespace monokernel::cpu {

void sample_request(Job& job, int64_t row) {
  const int64_t vocab = job.program.vocab_size;
  const Sampling& s = job.sampling;
  const SampleParams params{
      .temperature = s.temperature[row],
      .top_k = s.top_k[row],
      .top_p = s.top_p[row],
      .min_p = s.min_p[row],
      .repetition_penalty = s.repetition_penalty[row],
      .presence_penalty = s.presence_penalty[row],
      .logit_bias = s.logit_bias ? s.logit_bias + row * vocab : nullptr,
      .key = {job.key_data[2 * row], job.key_data[2 * row + 1]},
  };
  uint8_t* seen = job.seen + row * vocab;
  const Sampled chosen = sample_row(job.shared.logits + row * vocab, vocab, seen, job.position[row], params,
                                    job.log_probs != nullptr, job.shared.sampling + row * vocab, job.sample_isa);

  const int64_t at = row * job.max_new_tokens + job.lengths[row]++;
  job.tokens[at] = chosen.token;
  if (job.log_probs) job.log_probs[at] = chosen.log_prob;
  job.last_token[row] = chosen.token;
  job.position[row]++;
  seen[chosen.token] |= 2;
  if (job.mail) job.mail->put(row, chosen.token, chosen.log_prob);
  for (int64_t i = 0; i < s.eos_count; i++) {
    if (s.eos_token_id[row * s.eos_count + i] == chosen.token) job.status[row] = kStopped;
  }
}

}  // namespace monokernel::cpu
