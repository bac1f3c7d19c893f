// The native sampler on NumPy arrays, for tests: jax_monokernel._native.sample_rows and .sample_bits.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/sampling.h"

namespace monokernel::cpu {
namespace sampling_binding {

namespace py = pybind11;

// C-contiguous; arrays of another dtype are refused, not converted.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
const T* checked(const Array<T>& array, const char* name, std::vector<py::ssize_t> shape) {
  if (std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) != shape) {
    std::string expected;
    for (py::ssize_t size : shape) expected += std::to_string(size) + ", ";
    throw std::invalid_argument(std::string(name) + " has another shape than the expected (" + expected + ")");
  }
  return array.data();
}

inline SampleIsa parse_isa(const std::optional<std::string>& name) {
  const SampleIsa best = best_sample_isa();
  if (!name) return best;
  const char* names[] = {"base", "avx2", "avx512"};
  for (int i = 0; i <= static_cast<int>(best); i++) {
    if (*name == names[i]) return static_cast<SampleIsa>(i);
  }
  throw std::invalid_argument("this machine has no instruction set \"" + *name + "\" (base, avx2 and avx512 are known)");
}

inline py::tuple sample_rows(const Array<float>& logits, const std::optional<Array<uint8_t>>& seen,
                             const Array<uint32_t>& key_data, const Array<int32_t>& position,
                             const Array<float>& temperature, const Array<int32_t>& top_k, const Array<float>& top_p,
                             const Array<float>& min_p, const Array<float>& repetition_penalty,
                             const Array<float>& presence_penalty, const std::optional<Array<float>>& logit_bias,
                             bool log_probs, const std::optional<std::string>& isa) {
  if (logits.ndim() != 2 || logits.shape(1) < 1) throw std::invalid_argument("logits must be [batch, vocab]");
  const py::ssize_t batch = logits.shape(0), vocab = logits.shape(1);
  const float* z = logits.data();
  const uint8_t* seen_rows = seen ? checked(*seen, "seen", {batch, vocab}) : nullptr;
  const float* bias_rows = logit_bias ? checked(*logit_bias, "logit_bias", {batch, vocab}) : nullptr;
  const uint32_t* keys = checked(key_data, "key_data", {batch, 2});
  const int32_t* positions = checked(position, "position", {batch});
  const float* temperatures = checked(temperature, "temperature", {batch});
  const int32_t* top_ks = checked(top_k, "top_k", {batch});
  const float* top_ps = checked(top_p, "top_p", {batch});
  const float* min_ps = checked(min_p, "min_p", {batch});
  const float* repetitions = checked(repetition_penalty, "repetition_penalty", {batch});
  const float* presences = checked(presence_penalty, "presence_penalty", {batch});
  const SampleIsa use = parse_isa(isa);

  py::array_t<int32_t> tokens(batch);
  py::array_t<float> chosen_log_probs(batch);
  int32_t* token_out = tokens.mutable_data();
  float* log_prob_out = chosen_log_probs.mutable_data();
  {
    py::gil_scoped_release release;
    std::vector<float> scratch(vocab);
    for (py::ssize_t i = 0; i < batch; i++) {
      const SampleParams params = {temperatures[i],
                                   top_ks[i],
                                   top_ps[i],
                                   min_ps[i],
                                   repetitions[i],
                                   presences[i],
                                   bias_rows ? bias_rows + i * vocab : nullptr,
                                   {keys[2 * i], keys[2 * i + 1]}};
      const Sampled result = sample_row(z + i * vocab, vocab, seen_rows ? seen_rows + i * vocab : nullptr, positions[i],
                                        params, log_probs, scratch.data(), use);
      token_out[i] = result.token;
      log_prob_out[i] = result.log_prob;
    }
  }
  return py::make_tuple(tokens, chosen_log_probs);
}

inline py::array_t<uint32_t> sample_bits_array(const Array<uint32_t>& key_data, int32_t position, py::ssize_t count) {
  if (count < 0) throw std::invalid_argument("count must not be negative");
  py::array_t<uint32_t> bits(count);
  sample_bits(checked(key_data, "key_data", {2}), position, count, bits.mutable_data());
  return bits;
}

}  // namespace sampling_binding

inline void bind_sampling(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("sample_rows", &sampling_binding::sample_rows, py::kw_only(), py::arg("logits").noconvert(),
        py::arg("seen").noconvert(), py::arg("key_data").noconvert(), py::arg("position").noconvert(),
        py::arg("temperature").noconvert(), py::arg("top_k").noconvert(), py::arg("top_p").noconvert(),
        py::arg("min_p").noconvert(), py::arg("repetition_penalty").noconvert(),
        py::arg("presence_penalty").noconvert(), py::arg("logit_bias").noconvert() = py::none(),
        py::arg("log_probs") = true, py::arg("isa") = py::none(),
        "The native sampler on rows: (tokens int32 [batch], log-probabilities f32 [batch]).");
  m.def("sample_bits", &sampling_binding::sample_bits_array, py::arg("key_data").noconvert(), py::arg("position"),
        py::arg("count"), "The first `count` random words of a request at a position: uint32 [count].");
}

}  // namespace monokernel::cpu
