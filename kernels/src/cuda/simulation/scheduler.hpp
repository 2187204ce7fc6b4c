// What the files of the simulation share beside device.hpp.
#pragma once

#include "device.hpp"
#include "races.hpp"

namespace simulation {

// The running thread's number in its block, and how many there are.
int running_thread();
int block_threads();
// The launch's order of threads: 0 ascending, 1 descending, others random.
unsigned launch_order();

// Lets others run until `ready` says that this thread can go on.
void wait_until(const char *what, bool (*ready)(void *), void *context);

// As `fail`, when the block's threads have ended.
void fail_block(const char *what);

// Whether an address is of a thread's stack, or of what threads exchange: nobody else's memory.
bool is_private(const void *at);
unsigned char *static_shared();
size_t static_shared_bytes();

// Hopper's part (hopper.cpp): before a block, and after its threads have ended.
void begin_hopper();
void end_hopper();

} // namespace simulation
