#include "pool.h"

#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace kbit {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Some 20 microseconds on a Xeon: longer than the work between two barriers of a decode step differs between
// threads, short enough that an idle pool costs nothing.
constexpr int kSpins = 2000;
// Some 200 microseconds: longer than it takes to choose the next token.
constexpr int kPatientSpins = 20000;

int spins_for(int threads, int spins) {
  const unsigned cores = std::thread::hardware_concurrency();
  return cores != 0 && static_cast<unsigned>(threads) > cores ? 0 : spins;
}

}  // namespace

bool Barrier::arrive() {
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < count_) return false;
  arrived_.store(0, std::memory_order_relaxed);
  // seq_cst here and in wait: either the last one sees a sleeper, or the sleeper sees the new phase.
  // Not a store: QEMU lets the load below pass an aarch64 store-release, and both then sleep for ever.
  phase_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  return true;
}

void Barrier::wait() {
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrive()) return;
  for (int i = 0; i < spins_; ++i) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  wake_.wait(lock, [&] { return phase_.load(std::memory_order_seq_cst) != phase; });
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

Pool::Pool(int threads, bool patient)
    : threads_(threads < 1 ? 1 : threads),
      start_(threads_, spins_for(threads_, patient ? kPatientSpins : kSpins)),
      end_(threads_, spins_for(threads_, kSpins)),
      inner_(threads_, spins_for(threads_, kSpins)) {
  try {
    for (int thread = 1; thread < threads_; ++thread) {
      workers_.emplace_back([this, thread] { work(thread); });
    }
  } catch (const std::system_error&) {
    const std::string started = std::to_string(workers_.size() + 1);
    end();
    throw std::runtime_error("only " + started + " of " + std::to_string(threads_) +
                             " threads could be started; ask for fewer");
  }
}

Pool::~Pool() { end(); }

void Pool::end() {
  stop_ = true;
  for (size_t thread = workers_.size(); thread < static_cast<size_t>(threads_); ++thread) start_.arrive();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::work(int thread) {
  for (;;) {
    start_.wait();
    if (stop_) return;
    (*job_)(thread);
    end_.wait();
  }
}

void Pool::run(const std::function<void(int)>& job) {
  std::lock_guard<std::mutex> lock(busy_);
  if (workers_.empty()) return job(0);
  job_ = &job;
  start_.wait();
  job(0);
  end_.wait();
}

}  // namespace kbit
