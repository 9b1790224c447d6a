#include "emulator.h"

#include <algorithm>
#include <csetjmp>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The linker's names for the ends of what is declared __shared__; null where nothing is.
extern unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

unsigned char* shared_memory;
size_t shared_bytes;

namespace {

constexpr size_t kStack = 128 * 1024;

enum class State { kReady, kExchange, kBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool done;
};

struct Fiber : Lane {
  ucontext_t start;
  int number;
  jmp_buf point;
  bool started;
  State state;
  uint3 thread;
  Exchange run;
  bool orders;
  const char* name;
  std::vector<Copy> open;                 // copies of the group that is not committed yet
  std::vector<std::vector<Copy>> groups;  // oldest first
  std::vector<unsigned char> stack;
};

std::vector<Fiber> fibers;
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* body;
int64_t launched = 0;
std::set<const void*> kernels;  // that were launched
std::string error;
std::mt19937 order(1);
std::map<const void*, size_t> allowed;

bool coin() { return order() & 1; }

// When a thread touched a byte: how many barriers of the block and how many orderings of its warp
// there had been.
struct Access {
  int thread = -1, barriers, orderings;
};
// The last write, and the last reads by up to two threads.
struct Byte {
  Access write, reads[2];
  int arriving = -1;  // the block in which an asynchronous copy to it is not waited for
};
bool watched;  // the kernels call what stands at the end of this file
std::vector<Byte> bytes_of_dynamic, bytes_of_static;
int barriers, blocks;        // of all blocks so far
std::vector<int> orderings;  // of each warp, likewise

Access now() { return {current->number, barriers, orderings[current->number / kWarp]}; }

bool may_race(const Access& before) {
  if (before.thread < 0 || before.thread == current->number || before.barriers != barriers)
    return false;
  const int warp = current->number / kWarp;
  return before.thread / kWarp != warp || before.orderings == orderings[warp];
}

Byte* byte_at(const void* p) {
  const unsigned char* const at = static_cast<const unsigned char*>(p);
  if (at >= shared_memory && at < shared_memory + shared_bytes)
    return &bytes_of_dynamic[at - shared_memory];
  if (at >= __start_emulated_shared && at < __stop_emulated_shared)
    return &bytes_of_static[at - __start_emulated_shared];
  return nullptr;
}

void race(const char* what, const Access& other) {
  if (!error.empty()) return;
  error = std::string("a race in shared memory: thread ") + std::to_string(current->number) + what +
          std::to_string(other.thread);
}

void touch(const void* p, size_t bytes, bool write) {
  if (!watched || current == nullptr) return;
  for (size_t i = 0; i < bytes; ++i) {
    Byte* const byte = byte_at(static_cast<const char*>(p) + i);
    if (byte == nullptr) continue;
    if (byte->arriving == blocks) race(" touches what is still copied by thread ", byte->write);
    if (may_race(byte->write))
      race(write ? " overwrites thread " : " reads of thread ", byte->write);
    if (write) {
      for (const Access& read : byte->reads)
        if (may_race(read)) race(" overwrites what is read by thread ", read);
      byte->write = now();
      byte->reads[0] = byte->reads[1] = Access{};
    } else if (byte->reads[0].thread < 0 || byte->reads[0].thread == current->number ||
               !may_race(byte->reads[0])) {
      byte->reads[0] = now();
    } else {
      byte->reads[1] = now();
    }
  }
}

void mark_arriving(const void* to, int block) {
  for (int i = 0; watched && i < 16; ++i)
    if (Byte* const byte = byte_at(static_cast<const char*>(to) + i)) byte->arriving = block;
}

void enter() {
  try {
    (*body)();
  } catch (const std::exception& failure) {
    if (error.empty()) error = failure.what();
  }
  current->state = State::kDone;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

void wait_as(State state) {
  current->state = state;
  if (_setjmp(current->point) == 0) _longjmp(scheduler, 1);
}

void do_copy(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
}

// Lets the lanes of a warp go on if all wait at the same exchange; whether it did.
bool release(Fiber* lanes) {
  Lane* all[kWarp];
  int waiting = 0, done = 0;
  for (int i = 0; i < kWarp; ++i) {
    all[i] = &lanes[i];
    waiting += lanes[i].state == State::kExchange;
    done += lanes[i].state == State::kDone;
  }
  if (waiting == 0 || waiting + done < kWarp) return false;
  if (done > 0) throw std::runtime_error(std::string("lanes left before ") + lanes[0].name);
  for (int i = 1; i < kWarp; ++i)
    if (lanes[i].run != lanes[0].run)
      throw std::runtime_error(std::string("lanes of a warp at ") + lanes[0].name + " and at " +
                               lanes[i].name);
  current = nullptr;
  lanes[0].run(all);
  orderings[lanes[0].number / kWarp] += lanes[0].orders;
  for (int i = 0; i < kWarp; ++i) lanes[i].state = State::kReady;
  return true;
}

void run_block() {
  const int threads = static_cast<int>(fibers.size()), warps = threads / kWarp;
  std::vector<int> lanes(kWarp), turns(warps);
  for (int i = 0; i < kWarp; ++i) lanes[i] = i;
  for (int i = 0; i < warps; ++i) turns[i] = i;
  while (true) {
    bool moved = false;
    std::shuffle(turns.begin(), turns.end(), order);
    for (const int warp : turns) {
      if (moved && coin()) continue;  // warps drift apart
      std::shuffle(lanes.begin(), lanes.end(), order);
      for (const int lane : lanes) {
        Fiber& fiber = fibers[warp * kWarp + lane];
        if (fiber.state != State::kReady) continue;
        resume(fiber);
        moved = true;
        if (!error.empty()) return;
      }
      moved |= release(&fibers[warp * kWarp]);
    }
    if (moved) continue;
    int done = 0, at_barrier = 0;
    for (const Fiber& fiber : fibers) {
      done += fiber.state == State::kDone;
      at_barrier += fiber.state == State::kBarrier;
    }
    if (done == threads) return;
    if (done + at_barrier < threads || done > 0)
      throw std::runtime_error("a barrier that some threads never reach");
    for (Fiber& fiber : fibers) fiber.state = State::kReady;
    ++barriers;
  }
}

// Memory that ends at a page without access.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = (bytes + page - 1) / page * page;
    size_ = used + page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + used, page, PROT_NONE);
    data_ = base_ + used - bytes;
  }
  ~Guarded() { munmap(base_, size_); }
  unsigned char* data() { return data_; }

 private:
  unsigned char *base_, *data_;
  size_t size_;
};

}  // namespace

void fail(const char* what) { throw std::runtime_error(what); }

void barrier() { wait_as(State::kBarrier); }

void exchange(Exchange run, const char* name, const void* in, size_t in_bytes, void* out,
              size_t out_bytes, bool orders) {
  Fiber* const self = current;
  self->run = run;
  self->orders = orders;
  self->name = name;
  if (in_bytes > 0) std::memcpy(self->in, in, in_bytes);
  wait_as(State::kExchange);
  if (out_bytes > 0) std::memcpy(out, self->out, out_bytes);
}

void copy_later(void* to, const void* from, int bytes) {
  check_shared(to, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp.async from an unaligned address");
  if (bytes != 0 && bytes != 16) fail("cp.async of neither 0 nor 16 bytes");
  touch(to, 16, true);
  mark_arriving(to, blocks);
  Copy copy{to, from, bytes, coin()};
  if (copy.done) do_copy(copy);
  current->open.push_back(copy);
}

void note_access(const void* p, size_t bytes, bool write) { touch(p, bytes, write); }

void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void wait_for_copies(int pending) {
  auto& groups = current->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) {
      if (!copy.done) do_copy(copy);
      mark_arriving(copy.to, -1);
      touch(copy.to, 16, true);
    }
    groups.erase(groups.begin());
  }
}

void check_shared(const void* p, size_t bytes) {
  const unsigned char* at = static_cast<const unsigned char*>(p);
  if (at < shared_memory || at + bytes > shared_memory + shared_bytes)
    fail("an address outside the block's shared memory");
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("an unaligned shared address");
}

const char* run_grid(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  error.clear();
  ++launched;
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0 || grid.y > 65535 || grid.z > 65535)
    error = "invalid configuration";
  const size_t bytes = (shared + 15) / 16 * 16;
  Guarded memory(bytes);
  shared_memory = memory.data();
  shared_bytes = shared;
  if (watched) {
    bytes_of_dynamic.resize(std::max(bytes_of_dynamic.size(), bytes));
    bytes_of_static.resize(static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
  }
  orderings.resize(1024 / kWarp);
  blockDim = block;
  gridDim = grid;
  body = &kernel;
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  fibers.resize(threads);
  for (unsigned z = 0; z < grid.z && error.empty(); ++z)
    for (unsigned y = 0; y < grid.y && error.empty(); ++y)
      for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
        blockIdx = {x, y, z};
        std::memset(shared_memory, 0xff, bytes);  // NaN
        if (__start_emulated_shared != __stop_emulated_shared)
          std::memset(__start_emulated_shared, 0xff,
                      static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
        ++blocks;
        ++barriers;
        for (size_t i = 0; i < threads; ++i) {
          Fiber& fiber = fibers[i];
          fiber.number = static_cast<int>(i);
          fiber.started = false;
          fiber.state = State::kReady;
          fiber.open.clear();
          fiber.groups.clear();
          fiber.stack.resize(kStack);
          const unsigned n = static_cast<unsigned>(i);
          fiber.thread = {n % block.x, n / block.x % block.y, n / block.x / block.y};
        }
        try {
          run_block();
        } catch (const std::exception& failure) {
          error = failure.what();
        }
      }
  return last_error();
}

const char* last_error() { return error.empty() ? nullptr : error.c_str(); }
const char* set_error(const char* what) {
  error = what;
  return last_error();
}

Launcher launcher;
const char* take(const Launch& launch) {
  ++launched;
  error.clear();
  if (launch.block.y != 1 || launch.block.z != 1) return set_error("a block that is not a line");
  return launcher(launch);
}

bool may_use(const void* kernel, size_t shared) {
  // 48 KiB, less what kernels may have of static shared memory.
  return shared <= 32 * 1024 || (allowed.count(kernel) != 0 && allowed[kernel] >= shared);
}
void allow(const void* kernel, size_t shared) { allowed[kernel] = shared; }

int64_t launches() { return launched; }
void note_launch(const void* kernel) { kernels.insert(kernel); }
std::vector<const void*> launched_kernels() { return {kernels.begin(), kernels.end()}; }
void set_seed(unsigned seed) { order.seed(seed); }

}  // namespace emulator

// What -fsanitize=thread calls, in place of the library that it belongs to.
extern "C" {
void __tsan_init() { emulator::watched = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, size_t bytes) { emulator::touch(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulator::touch(p, bytes, true); }
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }
#define EMULATOR_ACCESS(bytes)                                                     \
  void __tsan_read##bytes(void* p) { emulator::touch(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { emulator::touch(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulator::touch(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { emulator::touch(p, bytes, true); }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
}
