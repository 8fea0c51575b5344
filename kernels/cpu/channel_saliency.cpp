#include "kernels/cpu/channel_saliency.h"

#include <algorithm>
#include <cmath>

#include "kernels/dtype.h"

namespace stamp_fast::cpu {
namespace {

// Sums of runs are taken in accumulator_t, sums of those in double.
constexpr int64_t kRun = 512;
constexpr int64_t kRowRun = 64;
// Partial sums of a run, side by side, so that the compiler can use vectors without reordering sums.
constexpr int64_t kLanes = 16;
// Channels whose partial sums stay in the first-level cache.
constexpr int64_t kTile = 512;

struct Sums {
  double product = 0;
  double value = 0;
  double zeros = 0;
};

struct Columns {
  double* taylor;
  double* fisher;
  double* value;
  double* zeros;

  Columns(double* sums, int64_t channels)
      : taylor(sums), fisher(sums + channels), value(sums + 2 * channels), zeros(sums + 3 * channels) {}

  void clear(int64_t channel) { taylor[channel] = fisher[channel] = value[channel] = zeros[channel] = 0; }

  void add_image(int64_t channel, const Sums& sums) {
    taylor[channel] += std::abs(sums.product);
    fisher[channel] += sums.product * sums.product;
    value[channel] += sums.value;
    zeros[channel] += sums.zeros;
  }
};

// Adds `count` neighbouring elements of one channel.
template <typename T>
void add_run(const T* activation, const T* gradient, int64_t count, Sums& sums) {
  using Accumulator = accumulator_t<T>;
  Accumulator product[kLanes] = {}, value[kLanes] = {}, zeros[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = std::min(kLanes, count - i);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Accumulator a = widen(activation[i + lane]);
      product[lane] += a * widen(gradient[i + lane]);
      value[lane] += a;
      zeros[lane] += a == 0 ? Accumulator{1} : Accumulator{0};
    }
  }
  const int64_t used = std::min(kLanes, count);
  for (int64_t lane = 1; lane < used; ++lane) {
    product[0] += product[lane];
    value[0] += value[lane];
    zeros[0] += zeros[lane];
  }
  sums.product += product[0];
  sums.value += value[0];
  sums.zeros += zeros[0];
}

// Elements of a channel lie side by side.
template <typename T>
void add_planes(const SaliencyInput& input, int64_t image, int64_t channel_begin, int64_t channel_end,
                Columns& columns) {
  for (int64_t c = channel_begin; c < channel_end; ++c) {
    Sums sums;
    for (int64_t m = 0; m < input.outer; ++m) {
      const int64_t start = ((image * input.outer + m) * input.channels + c) * input.inner;
      for (int64_t k = 0; k < input.inner; k += kRun) {
        add_run(static_cast<const T*>(input.activation) + start + k, static_cast<const T*>(input.gradient) + start + k,
                std::min(kRun, input.inner - k), sums);
      }
    }
    columns.add_image(c, sums);
  }
}

// Partial sums of up to kTile channels.
template <typename T>
struct Tile {
  accumulator_t<T> product[kTile];
  accumulator_t<T> value[kTile];
  accumulator_t<T> zeros[kTile];

  explicit Tile(int64_t width) {
    for (auto* sums : {product, value, zeros}) std::fill_n(sums, width, accumulator_t<T>{0});
  }

  void add(const T* activation, const T* gradient, int64_t width) {
    using Accumulator = accumulator_t<T>;
    for (int64_t c = 0; c < width; ++c) {
      const Accumulator a = widen(activation[c]);
      product[c] += a * widen(gradient[c]);
      value[c] += a;
      zeros[c] += a == 0 ? Accumulator{1} : Accumulator{0};
    }
  }
};

// Channels lie side by side.
template <typename T>
void add_rows(const SaliencyInput& input, int64_t image, int64_t channel_begin, int64_t width, Columns& columns) {
  Tile<double> sums(width);
  for (int64_t begin = 0; begin < input.outer; begin += kRowRun) {
    const int64_t end = std::min(begin + kRowRun, input.outer);
    Tile<T> tile(width);
    // Row after row: several at a time would save loads and stores, but outrun the hardware's prefetching.
    for (int64_t m = begin; m < end; ++m) {
      const int64_t start = input.offset(image, channel_begin, m);
      tile.add(static_cast<const T*>(input.activation) + start, static_cast<const T*>(input.gradient) + start, width);
    }
    for (int64_t c = 0; c < width; ++c) {
      sums.product[c] += tile.product[c];
      sums.value[c] += tile.value[c];
      sums.zeros[c] += tile.zeros[c];
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    columns.add_image(channel_begin + c, {sums.product[c], sums.value[c], sums.zeros[c]});
  }
}

}  // namespace

void channel_saliency(const SaliencyInput& input, int64_t image_begin, int64_t image_end, int64_t channel_begin,
                      int64_t channel_end, double* sums) {
  Columns columns(sums, input.channels);
  for (int64_t c = channel_begin; c < channel_end; ++c) columns.clear(c);
  with_type(input.dtype, [&]<typename T>(T) {
    for (int64_t image = image_begin; image < image_end; ++image) {
      if (input.inner != 1) {
        add_planes<T>(input, image, channel_begin, channel_end, columns);
        continue;
      }
      for (int64_t c = channel_begin; c < channel_end; c += kTile) {
        add_rows<T>(input, image, c, std::min(kTile, channel_end - c), columns);
      }
    }
  });
}

void channel_saliency_finish(const SaliencyInput& input, int64_t parts, const double* sums, void* result) {
  const int64_t channels = input.channels;
  // The mean of nothing is 0.
  const auto count = static_cast<double>(std::max<int64_t>(input.images * input.positions(), 1));
  const double divisors[] = {1, 2, count, count};
  with_type(input.dtype, [&]<typename T>(T) {
    auto* out = static_cast<accumulator_t<T>*>(result);
    for (int64_t i = 0; i < 4 * channels; ++i) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * 4 * channels + i];
      out[i] = static_cast<accumulator_t<T>>(total / divisors[i / channels]);
    }
  });
}

}  // namespace stamp_fast::cpu
