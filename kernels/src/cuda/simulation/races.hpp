// Whether accesses to memory are ordered: what compute-sanitizer's racecheck looks for, for the simulated GPU.
//
// Of every access is kept who made it and when, by that one's own clock; of everybody, how far the others' clocks had
// gone in what lies before it for certain (vector clocks; after Flanagan and Freund's FastTrack, 2009). Two accesses to
// the same bytes, one of which writes, must be ordered that way, in whatever order the simulation happened to run them.
//
// Who makes accesses: the threads of a block; and, because they go on beside the thread that asked for them, its
// asynchronous copies until it waits for their group, the copy engine on behalf of a barrier until the barrier's phase is
// over, the copy engine's stores until they have been read, and a warp's products until it waits for them.
//
// What orders: __syncthreads, __syncwarp, named barriers, arrivals at barriers in shared memory and waits for their phase,
// and those waits. Not shuffles, votes, and products of a warp: they exchange registers alone. What ordinary accesses
// wrote, the copy engine and products of warpgroups see only behind a fence (`fence_shared_async`).
//
// Blocks of a launch are never ordered; launches are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace races {

typedef uint32_t Clock;
typedef uint16_t Actor;
constexpr Actor NOBODY = 0xffff;

enum Kind { READ, WRITE, ATOMIC };

// Whether anything is looked at. Without, the functions below do nothing.
#ifdef GRAFT_RACES
constexpr bool WATCHING = true;
#else
constexpr bool WATCHING = false;
#endif

// A launch begins; a block of it begins, with the shared memory that it has.
void begin_launch();
void begin_block(int threads, unsigned char *dynamic, size_t dynamic_bytes);

// What a thread has done itself: the accesses of the code that is compiled with hooks come here by themselves; those of
// instructions that the simulation replaces, from there.
void access(int thread, const void *at, size_t bytes, Kind kind, const void *code);

// What is gathered where threads meet: all that each of them knows.
struct Meeting;
Meeting *new_meeting(); // lives until the block ends
void come(Meeting *, int thread);
// Ends the gathering; what it came to can be learnt until the next end.
void end(Meeting *);
void learn(Meeting *, int thread);

// Work that goes on beside a thread. `SLOTS` kinds of it, each in groups that are waited for in order.
enum Beside { COPIES, STORES, PRODUCTS };
// An access of the group that is open.
void access_beside(int thread, Beside, const void *at, size_t bytes, Kind kind, const void *code);
// The same by a whole warp, whose first thread is `thread`: before it lies only what is so for each of its threads.
void access_of_warp(int thread, Beside, const void *at, size_t bytes, Kind kind, const void *code);
void close_group(int thread, Beside);
// All but the last `pending` closed groups of this thread are done, as this thread knows from here on. For the products
// of a warp: each thread by itself.
void groups_done(int thread, Beside, int pending);

// The copy engine on behalf of a barrier, asked by a thread: a number for each barrier.
Actor new_engine();
void access_of_engine(int thread, Actor engine, Clock phase, const void *at, size_t bytes, Kind kind, const void *code);
// The phase's copies are done, as those know who learn of this meeting.
void add_engine(Meeting *, Actor engine, Clock phase);
// What the copy engine writes to global memory: nobody in the launch knows when.
void access_never_done(int thread, const void *at, size_t bytes, const void *code);

// What this thread knows of ordinary accesses, the copy engine and products see.
void fence(int thread);

} // namespace races
