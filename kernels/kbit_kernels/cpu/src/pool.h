// A fixed pool of threads with barriers that spin first and then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace kbit {

// A place where `count` threads meet again and again. Waiting spins for some microseconds and then
// sleeps; where there are more threads than cores it sleeps at once.
class Barrier {
 public:
  Barrier(int count, int spins) : count_(count), spins_(spins) {}
  void wait();
  // Comes without waiting for the others; true if they all had come.
  bool arrive();

 private:
  const int count_, spins_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> phase_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Rows [first, second) of `total` for `part` of `parts`: contiguous, multiples of `grain`.
inline std::pair<int64_t, int64_t> share(int64_t total, int64_t grain, int part, int parts) {
  const int64_t grains = (total + grain - 1) / grain;
  const int64_t first = grains * part / parts * grain, second = grains * (part + 1) / parts * grain;
  return {first < total ? first : total, second < total ? second : total};
}

// `threads` threads, the caller of `run` among them; the others sleep between runs (after a short
// spin). They are kbit's own: no other library's pool is used or asked to shrink.
class Pool {
 public:
  // patient: threads wait for the next run awake, for longer than it takes to choose a token.
  // Throws std::runtime_error where the system does not start so many.
  explicit Pool(int threads, bool patient = false);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }
  // Calls job(thread) once on each thread, 0 on the caller, and returns when all are done. One run
  // at a time: a second caller waits. `job` must not throw.
  void run(const std::function<void(int thread)>& job);
  // Inside `run`: all threads of the pool meet.
  void barrier() { if (threads_ > 1) inner_.wait(); }

 private:
  void work(int thread);
  void end();

  const int threads_;
  Barrier start_, end_, inner_;
  const std::function<void(int)>* job_ = nullptr;
  bool stop_ = false;
  std::mutex busy_;
  std::vector<std::thread> workers_;
};

}  // namespace kbit
