// Runs the fuzz target where the compiler has no libFuzzer: `fuzz_record SECONDS FOLDER` first replays the folder's
// records, none of which may be refused, then mutates them.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

bool refused_record(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

// Numbers that are most often handled wrongly, in the records' encoding: -1, 2^31, 2^63 - 1, -2^63.
const std::vector<Bytes> kBoundaries = {{0x01},
                                        {0x80, 0x80, 0x80, 0x80, 0x10},
                                        {0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01},
                                        {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01}};

Bytes mutated(const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % std::max<size_t>(n, 1)); };
  Bytes bytes = corpus[below(corpus.size())];
  for (size_t count = 1 + below(8); count > 0 && !bytes.empty(); --count) {
    const size_t at = below(bytes.size());
    switch (below(6)) {
      case 0:
        bytes[at] = static_cast<uint8_t>(random());
        break;
      case 1:
        bytes[at] = static_cast<uint8_t>(bytes[at] + 2 * (below(2) * 2) - 2);  // the next number up or down
        break;
      case 2:
        bytes.erase(bytes.begin() + at, bytes.begin() + std::min(bytes.size(), at + 1 + below(16)));
        break;
      case 3: {
        const Bytes& number = kBoundaries[below(kBoundaries.size())];
        bytes.erase(bytes.begin() + at);
        bytes.insert(bytes.begin() + at, number.begin(), number.end());
        break;
      }
      case 4: {
        const size_t other = below(bytes.size());
        bytes[at] = bytes[other];
        break;
      }
      default: {
        const Bytes& donor = corpus[below(corpus.size())];
        const size_t from = below(donor.size());
        const size_t length = std::min(donor.size() - from, 1 + below(64));
        bytes.insert(bytes.begin() + at, donor.begin() + from, donor.begin() + from + length);
      }
    }
  }
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s SECONDS FOLDER\n", argv[0]);
    return 2;
  }
  std::vector<Bytes> corpus;
  for (const auto& entry : std::filesystem::directory_iterator(argv[2])) {
    std::ifstream file(entry.path(), std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    if (corpus.back().empty() || refused_record(corpus.back().data(), corpus.back().size())) {
      std::fprintf(stderr, "%s: a network's own record was refused\n", entry.path().c_str());
      return 1;
    }
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "%s: no records\n", argv[2]);
    return 2;
  }
  std::printf("%zu records of networks replayed\n", corpus.size());
  std::mt19937_64 random(0);
  size_t tried = 0;
  size_t refused = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoll(argv[1]));
  while (std::chrono::steady_clock::now() < end) {
    const Bytes bytes = mutated(corpus, random);
    // The input that a sanitizer stops at.
    if (const char* path = std::getenv("FUZZ_LAST")) {
      std::ofstream(path, std::ios::binary)
          .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }
    refused += refused_record(bytes.data(), bytes.size());
    ++tried;
  }
  std::printf("%zu mutated records: %zu refused with an exception, none crashed\n", tried, refused);
  return 0;
}
