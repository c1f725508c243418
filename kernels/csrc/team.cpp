// See team.h. Compiled once, without an instruction set of its own, so it may use the standard library.
#include "team.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace ibtpo {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kAwake = std::chrono::microseconds(200);  // longer than the caller's pause between two steps
constexpr int kLooks = 64;                               // polls between two looks at the clock

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  void run(int64_t parts, int64_t threads, void (*work)(void*, int64_t), void* context) {
    while (num_helpers_ < threads - 1 && start()) {
    }
    next_.store(job_ << kPartBits | kNoPart);  // a helper still looking at the last job must not use this one's fields
    work_.store(work, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    parts_.store(parts, std::memory_order_release);
    threads_.store(threads, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    next_.store(++job_ << kPartBits);  // from here on helpers come
    if (sleeping_.load() > 0) wake();
    while (take(0)) {
    }
    for (int64_t looks = 0; done_.load(std::memory_order_acquire) < parts; ++looks)
      looks < 1 << 12 ? pause() : std::this_thread::yield();
  }

  void rouse() {
    calls_.fetch_add(1);
    if (sleeping_.load() > 0) wake();
  }

  std::mutex in_use;

 private:
  static constexpr int kPartBits = 24;
  static constexpr uint64_t kNoPart = (uint64_t{1} << kPartBits) - 1;

  // Does one part as thread `index`; false if there is none.
  bool take(int64_t index) {
    uint64_t next = next_.load();
    for (;;) {
      const auto part = static_cast<int64_t>(next & kNoPart);
      // If one of these fields is a later job's than `next`, the exchange fails; if it succeeds, run() waits for this
      // part.
      const auto work = work_.load(std::memory_order_acquire);
      void* const context = context_.load(std::memory_order_acquire);
      if (index >= threads_.load(std::memory_order_acquire) || part >= parts_.load(std::memory_order_acquire))
        return false;
      if (!next_.compare_exchange_weak(next, next + 1)) continue;
      work(context, part);
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
  }

  // Starts one more helper; false if the system refuses: the others do the work.
  bool start() {
    try {
      std::thread([this, index = num_helpers_ + 1] { help(index); }).detach();
    } catch (const std::system_error&) {
      return false;
    }
    ++num_helpers_;
    return true;
  }

  [[noreturn]] void help(int64_t index) {
    for (;;) {
      const uint64_t seen = job(), calls = calls_.load();
      const auto is_called = [&] { return job() != seen || calls_.load() != calls; };
      while (take(index)) {
      }
      const auto until = Clock::now() + kAwake;
      for (int looks = 1; !is_called() && (looks % kLooks != 0 || Clock::now() < until); ++looks) pause();
      if (is_called()) continue;
      std::unique_lock<std::mutex> hold(mutex_);
      ++sleeping_;
      wake_.wait(hold, is_called);
      --sleeping_;
    }
  }

  void wake() {
    {
      const std::lock_guard<std::mutex> hold(mutex_);  // no helper is between its last look and sleep
    }
    wake_.notify_all();
  }

  uint64_t job() const { return next_.load() >> kPartBits; }

  std::atomic<void (*)(void*, int64_t)> work_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> parts_{0}, threads_{0}, done_{0};
  std::atomic<uint64_t> next_{0};  // the job's number, and the part that is next
  std::atomic<int64_t> sleeping_{0};
  std::atomic<uint64_t> calls_{0};  // of rouse
  uint64_t job_ = 0;                // the last one's number
  int64_t num_helpers_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The team of this process: a forked child has none of its parent's threads. Never freed, since its threads never end.
Team& team() {
  static std::atomic<Team*> current{nullptr};
  static std::atomic<pid_t> owner{0};
  static std::mutex making;
  if (owner.load(std::memory_order_acquire) != getpid()) {
    const std::lock_guard<std::mutex> hold(making);
    if (owner.load(std::memory_order_relaxed) != getpid()) {
      current.store(new Team, std::memory_order_relaxed);
      owner.store(getpid(), std::memory_order_release);
    }
  }
  return *current.load(std::memory_order_relaxed);
}

}  // namespace

void share_out(int64_t parts, int64_t threads, void (*work)(void* context, int64_t part), void* context) {
  if (parts > 1 && threads > 1) {
    Team& all = team();
    const std::unique_lock<std::mutex> hold(all.in_use, std::try_to_lock);
    if (hold.owns_lock()) return all.run(parts, threads, work, context);
  }
  for (int64_t part = 0; part < parts; ++part) work(context, part);
}

void rouse() { team().rouse(); }

}  // namespace ibtpo
