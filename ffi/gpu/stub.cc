#include <cctype>
#include <cstdio>
#include <sstream>
#include <string>

#include "gpu/request.h"

namespace monokernel::gpu {
namespace {

std::string literal(double value) {
  char text[64];
  std::snprintf(text, sizeof(text), "%af", static_cast<double>(static_cast<float>(value)));
  return text;
}

class Stub {
 public:
  template <typename T>
  void define(const char* field, const T& value) {
    text_ << "#define MK_";
    for (const char* c = field; *c; c++) text_ << static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
    text_ << " " << value << "\n";
  }
  // `row(out, i)` writes the inside of row i.
  template <typename Row>
  void define_table(const char* field, int64_t rows, const Row& row) {
    std::ostringstream table;
    table << "{";
    for (int64_t i = 0; i < rows; i++) {
      table << "{";
      row(table, i);
      table << "},";
    }
    table << "}";
    define(field, table.str());
  }
  std::string finish() {
    text_ << "#include \"kernel.h\"\n";
    return text_.str();
  }

 private:
  std::ostringstream text_;
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
  s.define_table("tile_table", kPhases * p.units,
                 [&](std::ostream& out, int64_t i) { out << p.tiles[i].begin << "," << p.tiles[i].count; });
  s.define_table("layer_table", p.num_layers,
                 [&](std::ostream& out, int64_t l) { out << p.layers[l].window << "," << p.layers[l].rope; });
  constexpr RopeRow kNone{};  // so that the table has a row
  s.define_table("rope_table", p.num_ropes > 0 ? p.num_ropes : 1, [&](std::ostream& out, int64_t r) {
    const RopeRow& rope = p.num_ropes > 0 ? p.ropes[r] : kNone;
    out << static_cast<int>(rope.scaling);
    for (double value : {rope.theta, rope.factor, rope.original_max_position, rope.attention_factor}) {
      out << "," << literal(value);
    }
    out << "," << static_cast<int64_t>(rope.inv_freq_row);
  });
  return s.finish();
}

}  // namespace monokernel::gpu
