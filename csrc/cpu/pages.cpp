#include "pages.h"

#include <algorithm>
#include <atomic>
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

using Clock = std::chrono::steady_clock;

int64_t nanoseconds_since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

constexpr uintptr_t trial_size = 4 * huge_size;
constexpr int64_t never = std::numeric_limits<int64_t>::max();

// Measures the nanoseconds that making the pages of so much new memory takes.
int64_t time_of(int advice) {
  constexpr uintptr_t size = trial_size;
  void* const memory = mmap(nullptr, size + huge_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return never;
  }
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(memory), huge_size);
  advise(begin, begin + size, advice);
  const auto start = Clock::now();
  if (advise(begin, begin + size, populate_write) != 0) {  // Linux before 5.14 has no MADV_POPULATE_WRITE
    for (uintptr_t page = begin; page < begin + size; page += page_size()) {
      *reinterpret_cast<volatile char*>(page) = 0;
    }
  }
  const int64_t taken = nanoseconds_since(start);
  munmap(memory, size + huge_size);
  return taken;
}

enum class Pages { whatever_the_system_makes, small, huge };

struct Choice {
  Pages pages;
  int64_t small_time;  // that small pages took in the trial
};

// Measures which pages are faster where the system leaves the choice to programs. Huge pages are made several times
// faster from memory that is free, but several times slower where a hypervisor has taken free memory back, or where
// memory has to be compacted.
Choice choose() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string choice;
  std::getline(file, choice);
  if (choice.find("[madvise]") == std::string::npos) {
    return {Pages::whatever_the_system_makes, never};
  }
  int64_t small = never, huge = never;
  for (int round = 0; round < 2; ++round) {
    small = std::min(small, time_of(MADV_NOHUGEPAGE));
    huge = std::min(huge, time_of(MADV_HUGEPAGE));
  }
  return {huge < small ? Pages::huge : Pages::small, small};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

// The choice of huge pages, output by output: one whose huge pages took longer than small ones is followed by some with
// small pages, then huge ones are tried again.
class HugePages {
 public:
  // To be called for each new output: whether it shall have huge pages.
  bool are_wanted() {
    const int64_t bytes = bytes_.exchange(0), nanoseconds = nanoseconds_.exchange(0);
    if (static_cast<double>(nanoseconds) * trial_size > static_cast<double>(chosen().small_time) * bytes) {
      wait_ = outputs_without + 1;
    }
    wait_ = std::max(wait_ - 1, 0);
    return wait_ == 0;
  }

  // Whether the newest output has them.
  bool are_made() const { return chosen().pages == Pages::huge && wait_ == 0; }

  void took(int64_t nanoseconds, size_t bytes) {
    nanoseconds_ += nanoseconds;
    bytes_ += static_cast<int64_t>(bytes);
  }

 private:
  static constexpr int outputs_without = 8;
  std::atomic<int> wait_ = 0;                         // outputs until the next with huge pages
  std::atomic<int64_t> nanoseconds_ = 0, bytes_ = 0;  // of the newest output
};

HugePages huge_pages;

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
  if (chosen().pages == Pages::huge && huge_pages.are_wanted()) {
    advise(round_up(begin, huge_size), round_down(end, huge_size), MADV_HUGEPAGE);
  }
  return true;
}

void fault_in(void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const auto start = Clock::now();
  advise(round_down(begin, page_size()), begin + bytes, populate_write);  // a failure only costs time
  if (huge_pages.are_made()) {
    huge_pages.took(nanoseconds_since(start), bytes);
  }
}

const char* how_pages_are_made() {
  switch (chosen().pages) {
    case Pages::huge:
      return huge_pages.are_made() ? "huge, which this machine was seen to make faster"
                                   : "small at the moment, as huge ones took longer";
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
