// The world as a child process: requests come in on one file descriptor, answers leave on another.
#pragma once

namespace deep_ep::sim {

// Serves until the other side closes. Returns the process's exit status.
int serve(int requests, int answers);

}  // namespace deep_ep::sim
