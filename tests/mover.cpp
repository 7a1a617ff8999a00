// The CPU's portable mover as a program of its own, without torch: what every processor but x86-64 is given.
//
// It reads one launch of one kernel (tests/portable.py writes it), steps it, and writes the memory as it is then. On
// x86-64 it is compiled as elsewhere.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>
#undef __x86_64__
#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX2__
#include "../csrc/cpu/baseline.cpp"

namespace {

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> found(count);
  if (std::fread(found.data(), sizeof(T), count, stdin) != size_t(count)) std::exit(2);
  return found;
}

int64_t number() { return read<int64_t>(1)[0]; }

}  // namespace

int main() {
  const auto kernel_words = read<int64_t>(3);
  const auto formats = read<int64_t>(number());
  wd::Kernel kernel;
  if (!wd::baseline::find(kernel_words[0], kernel_words[1], kernel_words[2], formats.data(), int(formats.size()),
                          &kernel))
    return 3;

  wd::Launch launch{};
  launch.chunk_size = int32_t(number());
  const auto chunks = read<int64_t>(number());
  launch.place_words = int32_t(number());
  const int64_t segments = number();
  auto places = read<int64_t>(segments * launch.place_words);
  auto moving = read<wd::Moving>(segments);
  launch.row_width = int32_t(number());
  const auto rows = read<double>(number() * launch.row_width);
  const auto control = read<wd::Control>(1);

  // Stretches of memory: where each lay, and how long it is. Here it lies elsewhere, as far from a multiple of 64
  // bytes.
  const auto stretches = read<int64_t>(2 * number());
  std::map<int64_t, char*> here;
  for (size_t i = 0; i < stretches.size(); i += 2) {
    const int64_t rest = stretches[i] & 63, room = (stretches[i + 1] + rest + 127) & ~int64_t(63);
    char* const memory = static_cast<char*>(std::aligned_alloc(64, size_t(room))) + rest;
    here[stretches[i]] = memory;
    if (std::fread(memory, 1, size_t(stretches[i + 1]), stdin) != size_t(stretches[i + 1])) return 2;
  }
  const auto moved = [&](int64_t address) { return here.count(address) ? int64_t(here[address]) : 0; };
  for (int64_t k = 0; k < segments; ++k) {
    moving[k].grad = reinterpret_cast<void*>(moved(reinterpret_cast<int64_t>(moving[k].grad)));
    for (int word = wd::kAddresses; word < launch.place_words; ++word) {
      int64_t& address = places[k * launch.place_words + word];
      address = moved(address);
    }
  }
  launch.chunks = chunks.data(), launch.places = places.data(), launch.moving = moving.data();
  launch.rows = rows.data(), launch.control = control.data();
#if defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t(1) << 24));  // the caller flushes subnormals: steps do not
#endif
  if (control[0].skip == 0) kernel.step_chunks(kernel, launch, 0, int64_t(chunks.size()));
  for (size_t i = 0; i < stretches.size(); i += 2) std::fwrite(here[stretches[i]], 1, size_t(stretches[i + 1]), stdout);
  return 0;
}
