-- How long inter-processor interrupts take, in nanoseconds, one a line. luajit ipi.lua busy|halted COUNT
-- busy: membarrier(2) interrupts the CPU that another process spins on, and waits for its answer: a round trip.
-- halted: a byte through a pipe wakes a process on the other CPU, which sleeps: half of a round trip there and back.

local ffi = require("ffi")
ffi.cdef [[
typedef struct { long s, ns; } timespec;
int clock_gettime(int clock, timespec *now);
long syscall(long number, ...);
int sched_setaffinity(int pid, size_t size, const unsigned long *mask);
int fork(void), pipe(int fds[2]), kill(int pid, int signal), usleep(unsigned us), close(int fd);
long read(int fd, void *data, size_t size), write(int fd, const void *data, size_t size);
]]
local C, MEMBARRIER, GLOBAL_EXPEDITED, REGISTER = ffi.C, 324, 2, 4
local mode, count = arg[1], tonumber(arg[2])
local time = ffi.new("timespec")

local function now()
  C.clock_gettime(1, time)
  return tonumber(time.s) * 1e9 + tonumber(time.ns)
end

local function pin(cpu)
  assert(C.sched_setaffinity(0, 8, ffi.new("unsigned long[1]", 2 ^ cpu)) == 0, "sched_setaffinity")
end

local function membarrier(command)
  assert(C.syscall(MEMBARRIER, ffi.cast("int", command), ffi.cast("int", 0), ffi.cast("int", 0)) == 0, "membarrier")
end

local there, back, byte = ffi.new("int[2]"), ffi.new("int[2]"), ffi.new("char[1]")
assert(C.pipe(there) == 0 and C.pipe(back) == 0, "pipe")
local child = C.fork()
if child == 0 then
  pin(1)
  C.close(there[1])
  if mode == "busy" then
    membarrier(REGISTER)
    C.write(back[1], byte, 1)
    while true do now() end
  end
  C.write(back[1], byte, 1)
  while C.read(there[0], byte, 1) == 1 do C.write(back[1], byte, 1) end
  os.exit(0)
end
pin(0)
C.read(back[0], byte, 1)
local times = {}
for i = 1, count + count / 10 do
  C.usleep(100) -- halted: until the other CPU sleeps again; busy: so that there are samples of many moments
  local start = now()
  if mode == "busy" then
    membarrier(GLOBAL_EXPEDITED)
    times[i] = now() - start
  else
    C.write(there[1], byte, 1)
    C.read(back[0], byte, 1)
    times[i] = (now() - start) / 2
  end
end
C.kill(child, 9)
for i = #times - count + 1, #times do print(("%d"):format(times[i])) end -- without what came before the code was translated
