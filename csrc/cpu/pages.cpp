#include "pages.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <limits>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastnorm::cpu {

#ifdef __linux__
namespace {

constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, which older headers do not name
constexpr uintptr_t huge_size = uintptr_t{2} << 20;

size_t page_size() {
  static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

uintptr_t round_down(uintptr_t address, uintptr_t size) { return address / size * size; }
uintptr_t round_up(uintptr_t address, uintptr_t size) { return round_down(address + size - 1, size); }

int advise(uintptr_t begin, uintptr_t end, int advice) {
  return begin < end ? madvise(reinterpret_cast<void*>(begin), end - begin, advice) : 0;
}

// Measures the seconds that making the pages of 8 MiB of new memory takes.
double time_of(int advice) {
  constexpr uintptr_t size = 4 * huge_size;
  void* const memory = mmap(nullptr, size + huge_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return std::numeric_limits<double>::infinity();
  }
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(memory), huge_size);
  advise(begin, begin + size, advice);
  const auto start = std::chrono::steady_clock::now();
  if (advise(begin, begin + size, populate_write) != 0) {  // Linux before 5.14 has no MADV_POPULATE_WRITE
    for (uintptr_t page = begin; page < begin + size; page += page_size()) {
      *reinterpret_cast<volatile char*>(page) = 0;
    }
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  munmap(memory, size + huge_size);
  return taken.count();
}

enum class Pages { whatever_the_system_makes, small, huge };

// Measures which pages are faster where the system leaves the choice to programs. Huge pages are made several times
// faster from memory that is free, but several times slower where a hypervisor has taken free memory back, or where
// memory has to be compacted.
Pages choose() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string choice;
  std::getline(file, choice);
  if (choice.find("[madvise]") == std::string::npos) {
    return Pages::whatever_the_system_makes;
  }
  double small = std::numeric_limits<double>::infinity(), huge = small;
  for (int round = 0; round < 2; ++round) {
    small = std::min(small, time_of(MADV_NOHUGEPAGE));
    huge = std::min(huge, time_of(MADV_HUGEPAGE));
  }
  return huge < small ? Pages::huge : Pages::small;
}

Pages chosen() {
  static const Pages pages = choose();
  return pages;
}

}  // namespace

bool is_fresh(const at::Tensor& tensor) {
  constexpr size_t worthwhile = size_t{4} << 20;
  if (tensor.nbytes() < worthwhile) {
    return false;
  }
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), end = begin + tensor.nbytes();
  // Looks at the last page: malloc extends its memory, and gives it back to the system, at the end.
  unsigned char is_present = 1;
  mincore(reinterpret_cast<void*>(round_down(end - 1, page_size())), page_size(), &is_present);
  if ((is_present & 1) != 0) {
    return false;
  }
  if (chosen() == Pages::huge) {
    advise(round_up(begin, huge_size), round_down(end, huge_size), MADV_HUGEPAGE);
  }
  return true;
}

void fault_in(void* data, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(data);
  advise(round_down(start, page_size()), start + bytes, populate_write);  // a failure only costs time
}

const char* how_pages_are_made() {
  switch (chosen()) {
    case Pages::huge:
      return "huge, which this machine was seen to make faster";
    case Pages::small:
      return "small, which this machine was seen to make faster";
    default:
      return "as the system makes them";
  }
}
#else
bool is_fresh(const at::Tensor&) { return false; }

void fault_in(void*, size_t) {}

const char* how_pages_are_made() { return "as the system makes them"; }
#endif

}  // namespace fastnorm::cpu
