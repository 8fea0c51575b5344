#include "kernels/cpu/columns.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

// Columns apart cannot be gathered by plain loops as fast as memory delivers them: with half of the columns of large
// bfloat16 weights kept, the loop takes 1.6 times as long as AVX-512's compress instructions.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SF_HAS_AVX512
#define SF_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,popcnt")))
#endif

namespace stamp_fast::cpu {
namespace {

#ifdef SF_HAS_AVX512

bool has_avx512() {
  static const bool supported = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return supported;
}

// Lanes are as wide as the element. Those not in `lanes` are neither read nor written.
template <size_t kBytes>
SF_AVX512 inline __m512i load(uint64_t lanes, const void* from) {
  if constexpr (kBytes == 2) return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes), from);
  if constexpr (kBytes == 4) return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), from);
  if constexpr (kBytes == 8) return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(lanes), from);
}

template <size_t kBytes>
SF_AVX512 inline void store(uint64_t lanes, void* to, __m512i values) {
  if constexpr (kBytes == 2) _mm512_mask_storeu_epi16(to, static_cast<__mmask32>(lanes), values);
  if constexpr (kBytes == 4) _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(lanes), values);
  if constexpr (kBytes == 8) _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(lanes), values);
}

template <size_t kBytes>
SF_AVX512 inline __m512i compress(uint64_t lanes, __m512i values) {
  if constexpr (kBytes == 2) return _mm512_maskz_compress_epi16(static_cast<__mmask32>(lanes), values);
  if constexpr (kBytes == 4) return _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), values);
  if constexpr (kBytes == 8) return _mm512_maskz_compress_epi64(static_cast<__mmask8>(lanes), values);
}

template <size_t kBytes>
SF_AVX512 inline __m512i expand(uint64_t lanes, __m512i values) {
  if constexpr (kBytes == 2) return _mm512_maskz_expand_epi16(static_cast<__mmask32>(lanes), values);
  if constexpr (kBytes == 4) return _mm512_maskz_expand_epi32(static_cast<__mmask16>(lanes), values);
  if constexpr (kBytes == 8) return _mm512_maskz_expand_epi64(static_cast<__mmask8>(lanes), values);
}

inline uint64_t first(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

template <typename T>
SF_AVX512 void gather_by_mask(const Columns& columns, const T* dense, const T* next, T* packed) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  for (int64_t m = 0; m < columns.outer; ++m) {
    for (int64_t c = 0; c < columns.dense_cols; c += kLanes) {
      const uint64_t kept = columns.mask[c / 64] >> (c % 64) & first(kLanes);
      const int64_t count = std::popcount(kept);
      __builtin_prefetch(next + c, 0, 2);
      const __m512i values = load<sizeof(T)>(first(std::min(kLanes, columns.dense_cols - c)), dense + c);
      store<sizeof(T)>(first(count), packed, compress<sizeof(T)>(kept, values));
      packed += count;
    }
    dense += columns.dense_cols;
    next += columns.dense_cols;
  }
}

template <typename T>
SF_AVX512 void scatter_by_mask(const Columns& columns, const T* packed, T* dense) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  for (int64_t m = 0; m < columns.outer; ++m, dense += columns.dense_cols) {
    for (int64_t c = 0; c < columns.dense_cols; c += kLanes) {
      const uint64_t kept = columns.mask[c / 64] >> (c % 64) & first(kLanes);
      const int64_t count = std::popcount(kept);
      const __m512i values = expand<sizeof(T)>(kept, load<sizeof(T)>(first(count), packed));
      store<sizeof(T)>(first(std::min(kLanes, columns.dense_cols - c)), dense + c, values);
      packed += count;
    }
  }
}

#endif

// Calls function(position in the packed row, position in the dense row, inner) for every column of every plane.
// kInner is `inner` where it is known at compile time, else 0.
template <int64_t kInner, typename Function>
inline void each_column(const Columns& columns, const Function& function) {
  const int64_t inner = kInner > 0 ? kInner : columns.inner;
  int64_t packed = 0, plane = 0;
  for (int64_t m = 0; m < columns.outer; ++m, plane += columns.dense_plane()) {
    for (int64_t c = 0; c < columns.cols; ++c, packed += inner) {
      function(packed, plane + columns.index[c] * inner, inner);
    }
  }
}

template <typename Function>
inline void each_column(const Columns& columns, const Function& function) {
  if (columns.inner == 1) return each_column<1>(columns, function);
  if (columns.inner == 9) return each_column<9>(columns, function);
  each_column<0>(columns, function);
}

template <typename T>
[[gnu::always_inline]] inline void multiply_loop(const Columns& columns, T* packed) {
  const auto* factors = reinterpret_cast<const accumulator_t<T>*>(columns.factors.data());
  const int64_t plane = columns.plane();
  for (int64_t m = 0; m < columns.outer; ++m, packed += plane) {
    for (int64_t k = 0; k < plane; ++k) packed[k] = narrow<T>(widen(packed[k]) * factors[k]);
  }
}

template <typename T>
[[gnu::always_inline]] inline void add_products_loop(const Columns& columns, const T* a, const T* b,
                                                     accumulator_t<T>* sums) {
  const int64_t plane = columns.plane();
  for (int64_t m = 0; m < columns.outer; ++m, a += plane, b += plane) {
    for (int64_t k = 0; k < plane; ++k) sums[k] += widen(a[k]) * widen(b[k]);
  }
}

#ifdef SF_HAS_AVX512

template <typename T>
SF_AVX512 void multiply_avx512(const Columns& columns, T* packed) {
  multiply_loop(columns, packed);
}

template <typename T>
SF_AVX512 void add_products_avx512(const Columns& columns, const T* a, const T* b, accumulator_t<T>* sums) {
  add_products_loop(columns, a, b, sums);
}

#endif

}  // namespace

Columns::Columns(const PackItem& item)
    : outer(item.outer), dense_cols(item.dense_cols), cols(item.cols), inner(item.inner), index(item.col_index) {
#ifdef SF_HAS_AVX512
  const bool ascends = index && std::adjacent_find(index, index + cols, std::greater_equal<>()) == index + cols;
  if (ascends && inner == 1 && has_avx512()) {
    mask.resize(static_cast<size_t>(dense_cols + 63) / 64);
    for (int64_t c = 0; c < cols; ++c) mask[index[c] / 64] |= uint64_t{1} << index[c] % 64;
  }
#endif
  if (!item.scale) return;
  with_type(item.dtype, [&]<typename T>(T) {
    factors.resize(static_cast<size_t>(plane()) * sizeof(accumulator_t<T>));
    auto* factor = reinterpret_cast<accumulator_t<T>*>(factors.data());
    for (int64_t c = 0; c < cols; ++c) {
      factor = std::fill_n(factor, inner, widen(static_cast<const T*>(item.scale)[c]));
    }
  });
}

template <typename T>
void gather(const Columns& columns, const T* dense, const T* next, T* packed) {
  if (!columns.index) {
    std::copy_n(dense, columns.row(), packed);
    return;
  }
#ifdef SF_HAS_AVX512
  if (!columns.mask.empty()) return gather_by_mask(columns, dense, next, packed);
#endif
  each_column(columns, [=](int64_t to, int64_t from, int64_t inner) {
    if (inner > 1) {
      __builtin_prefetch(next + from, 0, 2);
      __builtin_prefetch(next + from + inner - 1, 0, 2);  // often in the line after
    }
    std::memcpy(packed + to, dense + from, static_cast<size_t>(inner) * sizeof(T));
  });
}

template <typename T>
void scatter(const Columns& columns, const T* packed, T* dense) {
  if (!columns.index) {
    std::copy_n(packed, columns.row(), dense);
    return;
  }
#ifdef SF_HAS_AVX512
  if (!columns.mask.empty()) return scatter_by_mask(columns, packed, dense);
#endif
  // All bits zero is 0.0 in every type here.
  std::memset(static_cast<void*>(dense), 0, static_cast<size_t>(columns.dense_row()) * sizeof(T));
  each_column(columns, [=](int64_t from, int64_t to, int64_t inner) {
    std::memcpy(dense + to, packed + from, static_cast<size_t>(inner) * sizeof(T));
  });
}

template <typename T>
void multiply(const Columns& columns, T* packed) {
  if (columns.factors.empty()) return;
#ifdef SF_HAS_AVX512
  if (has_avx512()) return multiply_avx512(columns, packed);
#endif
  multiply_loop(columns, packed);
}

template <typename T>
void add_products(const Columns& columns, const T* a, const T* b, accumulator_t<T>* sums) {
#ifdef SF_HAS_AVX512
  if (has_avx512()) return add_products_avx512(columns, a, b, sums);
#endif
  add_products_loop(columns, a, b, sums);
}

#define SF_INSTANTIATE(T)                                       \
  template void gather(const Columns&, const T*, const T*, T*); \
  template void scatter(const Columns&, const T*, T*);          \
  template void multiply(const Columns&, T*);                   \
  template void add_products(const Columns&, const T*, const T*, accumulator_t<T>*);
SF_INSTANTIATE(float)
SF_INSTANTIATE(double)
SF_INSTANTIATE(BFloat16)
SF_INSTANTIATE(Float16)
#undef SF_INSTANTIATE

}  // namespace stamp_fast::cpu
