// Many small jobs through share_out, from one thread, from two at once and from a forked child; each part of each job
// has to be done once. Run by test_kernels_team.py; the argument "fork" adds the child.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "team.h"

namespace {

struct Job {
  std::vector<uint64_t> sums;
  uint64_t salt;
};

uint64_t chain(uint64_t part, uint64_t salt) {
  uint64_t x = part + salt;
  for (uint64_t i = 0; i < part % 7 * 50; ++i) x = x * 31 + 7;
  return x;
}

void work(void* context, int64_t part) {
  auto* job = static_cast<Job*>(context);
  job->sums[part] += chain(part, job->salt);  // twice is as wrong as never
}

bool run(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    Job job{std::vector<uint64_t>(round * 7 % 20), static_cast<uint64_t>(round)};
    if (round % 3 == 0) ibtpo::rouse();  // also where nobody sleeps, or is there yet
    ibtpo::share_out(job.sums.size(), 1 + round % 5, work, &job);
    for (uint64_t part = 0; part < job.sums.size(); ++part)
      if (job.sums[part] != chain(part, job.salt)) {
        std::printf("job %d: part %d is wrong\n", round, static_cast<int>(part));
        return false;
      }
    if (round % 500 == 0) usleep(500);  // helpers fall asleep
    if (round % 1000 == 0) {            // and are called for nothing, twice
      ibtpo::rouse();
      ibtpo::rouse();
      usleep(500);
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  bool right = run(20000), also[2] = {false, false};
  std::thread first([&] { also[0] = run(10000); }), second([&] { also[1] = run(10000); });
  first.join();
  second.join();
  right = right && also[0] && also[1];
  if (argc > 1 && std::strcmp(argv[1], "fork") == 0) {
    const pid_t child = fork();
    if (child == 0) _exit(run(5000) ? 0 : 1);
    int status = 1;
    waitpid(child, &status, 0);
    right = right && status == 0;
  }
  std::puts(right ? "right" : "WRONG");
  return right ? 0 : 1;
}
