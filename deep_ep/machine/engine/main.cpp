// The program around the engine. In a race-detector build only this file and the kernels know ThreadSanitizer.
#include <unistd.h>

#include "server.hpp"

int main() { return deep_ep::sim::serve(STDIN_FILENO, STDOUT_FILENO); }
