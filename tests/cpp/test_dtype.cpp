#include <cmath>
#include <limits>

#include "kernels/dtype.h"
#include "tests/cpp/check.h"

using stamp_fast::BFloat16;
using stamp_fast::Float16;
using stamp_fast::narrow;
using stamp_fast::widen;

namespace {

// Every value survives the way through float.
template <typename T>
void check_round_trip() {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const float wide = widen(T{static_cast<uint16_t>(bits)});
    const T back = narrow<T>(wide);
    CHECK(std::isnan(wide) ? std::isnan(widen(back)) : back.bits == bits);
  }
}

// Between two neighbours the nearer one is taken, and in the middle the even one.
template <typename T>
void check_rounding(uint16_t largest) {
  for (uint16_t bits = 0; bits < largest; ++bits) {
    const float low = widen(T{bits});
    const float high = widen(T{static_cast<uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;
    const uint16_t even = bits % 2 == 0 ? bits : bits + 1;
    CHECK(narrow<T>(middle).bits == even);
    CHECK(narrow<T>(std::nextafter(middle, low)).bits == bits);
    CHECK(narrow<T>(std::nextafter(middle, high)).bits == bits + 1);
    CHECK(narrow<T>(-middle).bits == (even | 0x8000));
  }
}

}  // namespace

int main() {
  check_round_trip<BFloat16>();
  check_round_trip<Float16>();
  check_rounding<Float16>(0x7bff);
  check_rounding<BFloat16>(0x7f7f);

  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(widen(narrow<Float16>(65504.0f)) == 65504.0f);
  CHECK(widen(narrow<Float16>(65519.0f)) == 65504.0f);
  CHECK(widen(narrow<Float16>(65520.0f)) == infinity);
  CHECK(widen(narrow<Float16>(-1e30f)) == -infinity);
  CHECK(widen(narrow<BFloat16>(std::numeric_limits<float>::max())) == infinity);
  CHECK(widen(narrow<BFloat16>(-infinity)) == -infinity);
}
