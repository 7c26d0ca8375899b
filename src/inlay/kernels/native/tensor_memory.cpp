// PyTorch's CPU tensors in one heap that is kept between training steps.
//
// glibc cannot give a freed block of 64-byte alignment to a request of the same size (it asks for
// more and trims), so its heap grows over identical steps. Here a block goes into the smallest
// free piece that is large enough, the lowest of equals, else to the end of the heap; free
// neighbours are joined. `inlay.memory.heap` follows the same rules in a plan.
//
// The heap is a range of addresses reserved once; pages become memory when first written.
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmallest = 4096;  // smaller blocks are left to PyTorch's own allocator
constexpr size_t kHugePage = size_t{2} << 20;

size_t rounded(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

class Heap {
 public:
  std::mutex mutex;

  bool reserve(size_t bytes) {
    if (begin_) return true;
    void* range = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return false;
    size_t address = reinterpret_cast<size_t>(range);
    begin_ = reinterpret_cast<char*>((address + kHugePage - 1) / kHugePage * kHugePage);
    size_ = bytes;
    madvise(begin_, size_, MADV_HUGEPAGE);
    return true;
  }

  bool owns(const void* p) const {
    return begin_ && p >= begin_ && p < begin_ + size_;
  }

  void* allocate(size_t wanted) {
    size_t size = rounded(wanted), start = top_;
    auto piece = by_size_.lower_bound({size, 0});
    if (piece != by_size_.end()) {
      size_t found = piece->first;
      start = piece->second;
      remove(start, found);
      if (found - size >= kSmallest)
        add(start + size, found - size);
      else
        size = found;
    } else {
      if (size > size_ - top_) return nullptr;
      top_ += size;
      touched_ = std::max(touched_, top_);
    }
    used_.emplace(start, size);
    return begin_ + start;
  }

  // Frees a block; unless its memory is to be kept, it goes back to the kernel.
  void free(void* p, bool keeps) {
    auto block = used_.find(static_cast<size_t>(static_cast<char*>(p) - begin_));
    size_t start = block->first, size = block->second;
    used_.erase(block);
    auto after = by_start_.lower_bound(start);
    if (after != by_start_.begin()) {
      auto before = std::prev(after);
      if (before->first + before->second == start) {
        size_t joined = before->first, length = before->second;
        remove(joined, length);
        start = joined;
        size += length;
      }
    }
    after = by_start_.find(start + size);
    if (after != by_start_.end()) {
      size_t length = after->second;
      remove(start + size, length);
      size += length;
    }
    if (start + size != top_) {
      add(start, size);
      if (!keeps) discard(start, start + size);
      return;
    }
    top_ = start;
    if (keeps) return;
    discard(top_, touched_);
    touched_ = top_;
  }

  void return_pages() {
    for (const auto& piece : by_start_) discard(piece.first, piece.first + piece.second);
    discard(top_, touched_);
    touched_ = top_;
  }

  size_t touched() const { return touched_; }

 private:
  void add(size_t start, size_t size) {
    by_start_.emplace(start, size);
    by_size_.emplace(size, start);
  }

  void remove(size_t start, size_t size) {
    by_start_.erase(start);
    by_size_.erase({size, start});
  }

  void discard(size_t start, size_t end) {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t first = (start + page - 1) / page * page, last = end / page * page;
    if (end == touched_) last = (end + page - 1) / page * page;
    if (first < last) madvise(begin_ + first, last - first, MADV_DONTNEED);
  }

  char* begin_ = nullptr;
  size_t size_ = 0, top_ = 0, touched_ = 0;
  std::map<size_t, size_t> by_start_;
  std::set<std::pair<size_t, size_t>> by_size_;
  std::unordered_map<size_t, size_t> used_;
};

Heap& heap() {
  static Heap* one = new Heap;  // outlives every tensor
  return *one;
}

c10::Allocator* before = nullptr;  // read and written under the heap's lock

void release(void* p) {
  if (!heap().owns(p)) {
    c10::GetDefaultCPUAllocator()->raw_deleter()(p);
    return;
  }
  c10::profiledCPUMemoryReporter().Delete(p);
  std::lock_guard<std::mutex> lock(heap().mutex);
  heap().free(p, before != nullptr);
}

struct KeptMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* p = nullptr;
    if (size >= kSmallest) {
      std::lock_guard<std::mutex> lock(heap().mutex);
      p = heap().allocate(size);
    }
    if (p)
      c10::profiledCPUMemoryReporter().New(p, size);
    else
      p = c10::GetDefaultCPUAllocator()->raw_allocate(size);
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

KeptMemory kept;

}  // namespace

extern "C" {

// Returns 0: done; 1: the addresses cannot be reserved; 2: another allocator is in charge.
int inlay_keep_tensors(int64_t bytes) {
  if (before) return 0;
  c10::Allocator* present = c10::GetCPUAllocator();
  if (present != c10::GetDefaultCPUAllocator()) return 2;
  if (!heap().reserve(static_cast<size_t>(bytes))) return 1;
  static bool forks = false;
  if (!forks) {
    forks = true;
    pthread_atfork([] { heap().mutex.lock(); }, [] { heap().mutex.unlock(); },
                   [] { heap().mutex.unlock(); });
  }
  std::lock_guard<std::mutex> lock(heap().mutex);
  before = present;
  c10::SetCPUAllocator(&kept);
  return 0;
}

void inlay_release_tensors() {
  std::lock_guard<std::mutex> lock(heap().mutex);
  if (before) c10::SetCPUAllocator(before);
  before = nullptr;
}

void inlay_return_pages() {
  std::lock_guard<std::mutex> lock(heap().mutex);
  heap().return_pages();
}

int64_t inlay_kept_bytes() {
  std::lock_guard<std::mutex> lock(heap().mutex);
  return static_cast<int64_t>(heap().touched());
}

}
