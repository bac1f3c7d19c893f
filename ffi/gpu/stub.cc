#include <cctype>
#include <cstdio>
#include <string>

#include "gpu/request.h"

namespace monokernel::gpu {
namespace {

std::string literal(double value) {
  char text[64];
  std::snprintf(text, sizeof(text), "%af", static_cast<double>(static_cast<float>(value)));
  return text;
}

// No iostreams anywhere in this module: a Python process may hold several copies of the C++ library, and a stream that was set
// up by one of them crashes in another.
class Stub {
 public:
  void define(const char* field, const std::string& value) {
    text_ += "#define MK_";
    for (const char* c = field; *c; c++) text_ += static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
    text_ += " " + value + "\n";
  }
  void define(const char* field, int64_t value) { define(field, std::to_string(value)); }
  // row(i) is the inside of row i.
  template <typename Row>
  void define_table(const char* field, int64_t rows, const Row& row) {
    std::string table = "{";
    for (int64_t i = 0; i < rows; i++) table += "{" + row(i) + "},";
    define(field, table + "}");
  }
  std::string finish() { return text_ + "#include \"kernel.h\"\n"; }

 private:
  std::string text_;
};

}  // namespace

std::string stub(const Request& request, int64_t shared_bytes) {
  const Program& p = request.program;
  Stub s;
#define X(name) s.define(#name, p.name);
  MONOKERNEL_INT_FIELDS(X)
#undef X
#define X(name) s.define(#name, literal(p.name));
  MONOKERNEL_FLOAT_FIELDS(X)
#undef X
  s.define("batch", request.batch);
  s.define("splits", request.splits);
  s.define("task_heads", request.task_heads);
  s.define("shared_bytes", shared_bytes);
  s.define("trace", request.trace ? 1 : 0);
  s.define("near", request.near ? 1 : 0);
  if (request.placed) s.define("placed", 1);
  if (request.long_parts) s.define("long_parts", 1);
  if (request.racecheck) s.define("racecheck", 1);
  const auto pair = [](int64_t a, int64_t b) { return std::to_string(a) + "," + std::to_string(b); };
  s.define_table("tile_table", kPhases * p.units, [&](int64_t i) { return pair(p.tiles[i].begin, p.tiles[i].count); });
  s.define_table("layer_table", p.num_layers, [&](int64_t l) { return pair(p.layers[l].window, p.layers[l].rope); });
  constexpr RopeRow kNone{};  // so that the table has a row
  s.define_table("rope_table", p.num_ropes > 0 ? p.num_ropes : 1, [&](int64_t r) {
    const RopeRow& rope = p.num_ropes > 0 ? p.ropes[r] : kNone;
    std::string row = std::to_string(static_cast<int>(rope.scaling));
    for (double value : {rope.theta, rope.factor, rope.original_max_position, rope.attention_factor}) row += "," + literal(value);
    return row + "," + std::to_string(static_cast<int64_t>(rope.inv_freq_row));
  });
  return s.finish();
}

}  // namespace monokernel::gpu
