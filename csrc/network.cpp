#include "network.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "blocks.h"
#include "sparse_infer.h"

#define PQK_KERNELS "network_kernels.h"
#include "for_each_isa.h"

namespace pqk {

static_assert(sizeof(Step) == 33 * sizeof(int64_t), "deploy/executor.py writes it");

template <class Settings>
static Settings settings_of(const Step& step) {
  static_assert(sizeof(Settings) <= sizeof step.settings);
  Settings settings;
  std::memcpy(&settings, step.settings, sizeof settings);
  return settings;
}

int64_t Program::size(Place place) const {
  switch (place) {
    case Place::input: return input;
    case Place::output: return output;
    case Place::block: return block;
    case Place::plane: return plane;
  }
  return -1;
}

namespace {

constexpr int64_t LARGEST = int64_t{1} << 31;  // of any number in a program: products of two fit into 64 bits

Taps taps_of(const Program& program, const ConvSettings& conv) {
  return {program.places + conv.first, program.places + conv.taps, program.numbers + conv.values};
}

// Whether the sums are made where they are to lie. What vectors write past the end is nobody's in a thread's own memory;
// elsewhere it is another plane.
bool sums_stay(const Step& step, const ConvSettings& conv) {
  return step.out.place == Place::plane && conv.pitch == step.out.pitch;
}

// -- checks

// Whether `planes` planes of the value, each with `before` and `after` more, lie within its place.
bool within(const Program& program, const Value& value, int64_t planes, int64_t before = 0, int64_t after = 0) {
  const int64_t size = program.size(value.place), end = value.first + (planes - 1) * value.stride + value.run() + after;
  return value.rows > 0 && value.columns > 0 && value.pitch >= value.columns && value.stride >= 0 &&
         value.first >= before && end <= size;
}

bool conv_fits(const Program& program, const Step& step) {
  const ConvSettings conv = settings_of<ConvSettings>(step);
  const int64_t size = program.size(step.in[0].place), margin = sum_margin();
  if (step.in[0].place != Place::block || conv.positions < 1 || conv.first + step.planes + 1 > program.places_size ||
      conv.pitch < step.out.columns || (step.out.rows - 1) * conv.pitch + step.out.columns != conv.positions)
    return false;
  const Taps taps = taps_of(program, conv);
  const int64_t count = taps.first[step.planes];
  if (taps.first[0] != 0 || count < 0 || conv.taps + count > program.places_size ||
      conv.values + count > program.numbers_size)
    return false;
  bool right = true;
  for (int64_t c = 0; c < step.planes; ++c) right &= taps.first[c] <= taps.first[c + 1];
  const int64_t first = step.in[0].first, last = size - margin - conv.positions;
  for (int64_t t = 0; t < count; ++t) right &= first + taps.offset[t] >= 0 && first + taps.offset[t] <= last;
  const int64_t begin = sums_stay(step, conv) ? step.out.first : 0;
  return right && begin + conv.positions + margin <= program.plane;
}

bool deal_fits(const Program& program, const Step& step) {
  const DealSettings deal = settings_of<DealSettings>(step);
  const Value &in = step.in[0], &out = step.out;
  if (deal.stride_height < 1 || deal.stride_width < 1) return false;
  const int64_t phases = deal.stride_height * deal.stride_width;
  return out.rows * deal.stride_height >= in.rows + deal.padding_height &&
         out.pitch * deal.stride_width >= in.columns + deal.padding_width && out.columns == out.pitch &&
         phases < LARGEST && out.stride >= phases * out.rows * out.pitch &&
         out.first + (step.planes - 1) * out.stride + phases * out.rows * out.pitch <= program.size(out.place);
}

bool pool_fits(const Program& program, const Step& step) {
  const PoolSettings pool = settings_of<PoolSettings>(step);
  const Value &in = step.in[0], &out = step.out;
  return pool.stride_height > 0 && pool.stride_width > 0 && pool.kernel_height > pool.padding_height &&
         pool.kernel_width > pool.padding_width && pool.kernel_height <= in.rows + 2 * pool.padding_height &&
         pool.kernel_width <= in.columns + 2 * pool.padding_width && (out.rows - 1) * pool.stride_height - pool.padding_height < in.rows &&
         (out.columns - 1) * pool.stride_width - pool.padding_width < in.columns && pool_scratch(pool, in, out) <= program.plane;
}

bool rearrange_fits(const Program& program, const Step& step) {
  const RearrangeSettings settings = settings_of<RearrangeSettings>(step);
  int64_t last = settings.offset, count = 1;
  for (int i = 0; i < 4; ++i) {
    if (settings.sizes[i] < 1) return false;
    last += (settings.sizes[i] - 1) * settings.strides[i];
    count *= settings.sizes[i];
    if (count >= LARGEST) return false;
  }
  return step.planes == 1 && step.in[0].first + last < program.size(step.in[0].place) && step.out.first + count <= program.size(step.out.place);
}

bool same_run(const Value& a, const Value& b) { return a.run() == b.run(); }

bool fits(const Program& program, const Step& step) {
  const int64_t* fields = reinterpret_cast<const int64_t*>(&step);
  for (size_t i = 0; i < sizeof step / sizeof *fields; ++i)
    if (fields[i] < 0 || fields[i] >= LARGEST) return false;
  // every plane of a stage ends somewhere outside of a thread's own memory
  if (step.planes < 1 || step.planes > program.input + program.output + program.block) return false;
  if (step.out.place == Place::input) return false;
  if (step.kind != Kind::rearrange &&
      ((step.kind != Kind::conv && !within(program, step.in[0], step.planes)) ||
       !within(program, step.out, step.planes, step.lead, step.lead + step.gap)))
    return false;
  if (step.gap > step.out.pitch - step.out.columns) return false;
  const bool scales = step.kind == Kind::conv || step.kind == Kind::affine;
  if (scales && step.numbers + 2 * step.planes > program.numbers_size) return false;
  switch (step.kind) {
    case Kind::deal: return deal_fits(program, step);
    case Kind::conv: return conv_fits(program, step);
    case Kind::affine:
    case Kind::relu: return same_run(step.in[0], step.out);
    case Kind::add:
      return within(program, step.in[1], step.planes) && same_run(step.in[0], step.out) && same_run(step.in[1], step.out);
    case Kind::pool: return pool_fits(program, step);
    case Kind::mean: return true;
    case Kind::rearrange: return rearrange_fits(program, step);
  }
  return false;
}

// -- steps

// One sample's memory, and this thread's.
struct Memory {
  const float* input;
  float *output, *block, *plane;

  float* at(const Value& value, int64_t c) const {
    float* base = value.place == Place::output ? output : value.place == Place::block ? block : plane;
    return base + value.first + c * value.stride;
  }
  const float* read(const Value& value, int64_t c) const {
    return value.place == Place::input ? input + value.first + c * value.stride : at(value, c);
  }
};

void run_conv(const Program& program, const Step& step, const Memory& memory, int64_t c) {
  const ConvSettings conv = settings_of<ConvSettings>(step);
  const float *numbers = program.numbers + step.numbers, scale = numbers[c], shift = numbers[step.planes + c];
  const bool direct = sums_stay(step, conv);
  float *out = memory.at(step.out, c), *sums = direct ? out : memory.plane;
  sum_plane(memory.read(step.in[0], 0), taps_of(program, conv), c, conv.positions, scale, shift, conv.relu != 0,
            sums);
  if (direct) return;
  if (conv.pitch == step.out.pitch) {
    std::memmove(out, sums, conv.positions * sizeof(float));
    return;
  }
  for (int64_t y = 0; y < step.out.rows; ++y)
    std::memmove(out + y * step.out.pitch, sums + y * conv.pitch, step.out.columns * sizeof(float));
}

void run_deal(const Step& step, const Memory& memory, int64_t c) {
  const DealSettings deal = settings_of<DealSettings>(step);
  const int64_t size = step.out.rows * step.out.pitch, phases = deal.stride_height * deal.stride_width;
  const float* x = memory.read(step.in[0], c);
  float* out = memory.at(step.out, c);
  std::memset(out, 0, phases * size * sizeof(float));
  for (int64_t y = 0; y < step.in[0].rows; ++y, x += step.in[0].pitch) {
    const int64_t row = y + deal.padding_height, phase = row % deal.stride_height * deal.stride_width;
    float* to = out + phase * size + row / deal.stride_height * step.out.pitch;
    if (deal.stride_width == 1) {
      std::memmove(to + deal.padding_width, x, step.in[0].columns * sizeof(float));
      continue;
    }
    for (int64_t i = 0; i < step.in[0].columns; ++i) {
      const int64_t column = i + deal.padding_width;
      to[column % deal.stride_width * size + column / deal.stride_width] = x[i];
    }
  }
}

void run_pool(const Step& step, const Memory& memory, int64_t c) {
  const Value &in = step.in[0], &out = step.out;
  PQK_DISPATCH(plane_pool, memory.read(in, c), in.rows, in.columns, in.pitch, settings_of<PoolSettings>(step),
               memory.plane, out.rows, out.columns, out.pitch, memory.at(out, c));
}

void run_rearrange(const Step& step, const Memory& memory) {
  const RearrangeSettings s = settings_of<RearrangeSettings>(step);
  const float* x = memory.read(step.in[0], 0) + s.offset;
  float* out = memory.at(step.out, 0);
  for (int64_t i = 0; i < s.sizes[0]; ++i)
    for (int64_t j = 0; j < s.sizes[1]; ++j)
      for (int64_t k = 0; k < s.sizes[2]; ++k)
        for (int64_t l = 0; l < s.sizes[3]; ++l)
          *out++ = x[i * s.strides[0] + j * s.strides[1] + k * s.strides[2] + l * s.strides[3]];
}

// Zeros around the rows of plane c; those after the last row are the next plane's.
void clean(const Step& step, const Memory& memory, int64_t c) {
  float* first = memory.at(step.out, c);
  std::memset(first - step.lead, 0, step.lead * sizeof(float));
  for (int64_t y = 0; y < step.out.rows; ++y)
    for (int64_t i = 0; i < step.gap; ++i) first[y * step.out.pitch + step.out.columns + i] = 0.0f;
  if (c + 1 == step.planes) std::memset(first + step.out.run() + step.gap, 0, step.lead * sizeof(float));
}

void run_plane(const Program& program, const Step& step, const Memory& memory, int64_t c) {
  const Value& in = step.in[0];
  const auto x = [&] { return memory.read(in, c); };
  const auto out = [&] { return memory.at(step.out, c); };
  switch (step.kind) {
    case Kind::deal: return run_deal(step, memory, c);
    case Kind::conv: run_conv(program, step, memory, c); break;
    case Kind::affine: {
      const float* numbers = program.numbers + step.numbers;
      PQK_DISPATCH(plane_affine, x(), in.run(), numbers[c], numbers[step.planes + c], out());
      break;
    }
    case Kind::relu: PQK_DISPATCH(plane_relu, x(), in.run(), out()); break;
    case Kind::add: PQK_DISPATCH(plane_add, x(), memory.read(step.in[1], c), in.run(), out()); break;
    case Kind::pool: run_pool(step, memory, c); break;
    case Kind::mean:
      *out() = PQK_DISPATCH(plane_sum, x(), in.rows, in.columns, in.pitch) / static_cast<float>(in.rows * in.columns);
      break;
    case Kind::rearrange: return run_rearrange(step, memory);
  }
  if (step.lead || step.gap) clean(step, memory, c);
}

// Values that one plane of a step takes, for the number of threads.
int64_t work_of(const Program& program, const Step& step) {
  if (step.kind != Kind::conv) return step.in[0].run();
  const ConvSettings conv = settings_of<ConvSettings>(step);
  return conv.positions * (1 + taps_of(program, conv).first[step.planes] / step.planes);
}

}  // namespace

const char* problem(const Program& program) {
  for (const int64_t size : {program.input, program.output, program.block, program.plane})
    if (size < 0 || size >= LARGEST) return "its sizes are out of bounds";
  for (int64_t i = 0; i < program.count; ++i) {
    if (!fits(program, program.steps[i])) return "a step does not stay within memory";
    if (program.steps[i].joined && (i == 0 || program.steps[i].planes != program.steps[i - 1].planes))
      return "a step is joined to one of other planes";
  }
  return nullptr;
}

void run_network(const Program& program, const float* x, int64_t batch, float* out) {
  thread_local std::vector<float> block;
  if (static_cast<int64_t>(block.size()) < program.block) block.resize(program.block);
  float* const memory = block.data();
  for (int64_t sample = 0; sample < batch; ++sample) {
    for (int64_t begin = 0, end; begin < program.count; begin = end) {
      int64_t work = 0;
      for (end = begin; end < program.count && (end == begin || program.steps[end].joined); ++end)
        work += work_of(program, program.steps[end]);
      const int64_t grain = std::max<int64_t>(1, 4 * SERIAL / std::max<int64_t>(1, work));
      const int64_t first = begin, last = end, planes = program.steps[begin].planes;
      parallel_for(planes, grain, [&](int64_t from, int64_t to) {
        thread_local std::vector<float> plane;
        if (static_cast<int64_t>(plane.size()) < program.plane) plane.resize(program.plane);
        const Memory here{x + sample * program.input, out + sample * program.output, memory, plane.data()};
        for (int64_t c = from; c < to; ++c)
          for (int64_t i = first; i < last; ++i) run_plane(program, program.steps[i], here, c);
      });
    }
  }
}

}  // namespace pqk
