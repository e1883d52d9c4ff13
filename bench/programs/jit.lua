-- What LuaJIT's compiler has to get right: each part prints its name and a checksum that is the same on every machine.
-- luajit -jon jit.lua [SCALE], luajit -joff jit.lua [SCALE]

local bit, ffi = require("bit"), require("ffi")
local band, bor, bxor, shl, shr, sar, rol, bswap =
  bit.band, bit.bor, bit.bxor, bit.lshift, bit.rshift, bit.arshift, bit.rol, bit.bswap
local scale = tonumber(arg[1] or "1")

local state = 12345
local function random() -- xorshift32
  state = bxor(state, shl(state, 13))
  state = bxor(state, shr(state, 17))
  state = bxor(state, shl(state, 5))
  return state
end

local function checksum(text)
  local hash = 5381
  for i = 1, #text do hash = bxor(rol(hash, 5), text:byte(i)) end
  return hash
end

local parts = {}
local function part(name, run) parts[#parts + 1] = { name, run } end

part("bits", function()
  local a, b = 1, 0
  for i = 1, 3000000 * scale do
    a = bxor(rol(a, 7), i)
    b = bor(band(b, 0x7f7f7f7f), shr(a, 3)) + sar(a, 9)
    b = bswap(bit.tobit(b))
  end
  return a, b
end)

part("numbers", function()
  local x, y, n = 0.5, 0, 0
  for i = 1, 2000000 * scale do
    x = 3.99 * x * (1 - x)
    y = y + math.floor(x * 1000) % 7 - math.abs(x - 0.5) + math.sqrt(x) + math.max(x, 0.3) - math.fmod(i, 3.5)
    if x > 0.9 then n = n + 1 elseif x < 0.1 then n = n + 2 end
  end
  return ("%.17g %.17g %d"):format(x, y, n)
end)

part("nbody", function()
  local bodies = {}
  for i = 1, 5 do
    bodies[i] = { x = i * 1.5, y = i * 0.3 - 1, z = 1 / i, vx = 0.1 * i, vy = 0.2 / i, vz = -0.05 * i, m = 10 / (i * i) }
  end
  for _ = 1, 40000 * scale do
    for i = 1, 5 do
      local a = bodies[i]
      for j = i + 1, 5 do
        local b = bodies[j]
        local dx, dy, dz = a.x - b.x, a.y - b.y, a.z - b.z
        local d2 = dx * dx + dy * dy + dz * dz + 0.01
        local f = 0.001 / (d2 * math.sqrt(d2))
        a.vx, a.vy, a.vz = a.vx - dx * b.m * f, a.vy - dy * b.m * f, a.vz - dz * b.m * f
        b.vx, b.vy, b.vz = b.vx + dx * a.m * f, b.vy + dy * a.m * f, b.vz + dz * a.m * f
      end
    end
    for i = 1, 5 do
      local a = bodies[i]
      a.x, a.y, a.z = a.x + 0.001 * a.vx, a.y + 0.001 * a.vy, a.z + 0.001 * a.vz
    end
  end
  local text = {}
  for i = 1, 5 do text[i] = ("%.17g %.17g"):format(bodies[i].x, bodies[i].vy) end
  return table.concat(text, " ")
end)

part("tables", function()
  local t, sum = {}, 0
  for i = 1, 200000 * scale do
    local key = band(random(), 0xffff)
    t[key] = (t[key] or 0) + i
    if i % 3 == 0 then t["k" .. key % 500] = i end
    if i % 7 == 0 then t[key] = nil end
  end
  local list = {}
  for _, v in pairs(t) do list[#list + 1] = v end
  table.sort(list)
  for i = 1, #list do sum = (sum * 31 + list[i]) % 4294967296 end
  return sum, #list
end)

part("strings", function()
  local out = {}
  for i = 1, 40000 * scale do
    local s = ("%08x-%d"):format(band(random(), 0x7fffffff), i)
    out[#out + 1] = s:upper():reverse():sub(2, -2)
    if s:find("a+b") then out[#out + 1] = s:gsub("%d", function(d) return d + 1 end) end
    if #out > 1000 then out = { checksum(table.concat(out, ",")) .. "" } end
  end
  return checksum(table.concat(out, ","))
end)

part("traces", function() -- types and branches that change under a compiled trace's feet
  local total = 0
  local ops = {
    function(a, b) return a + b end,
    function(a, b) return a * b % 1000003 end,
    function(a, b) return a > b and a - b or b - a end,
    function(a, b) return tostring(a):len() + b end,
    function(a, b) local ok, e = pcall(error, a % 97); return ok and 0 or e + b end,
  }
  for i = 1, 300000 * scale do
    local op = ops[shr(bit.tobit(i * 2654435), 5) % #ops + 1]
    total = (total * 31 + op(total % 65536, i)) % 16777216
  end
  return total
end)

part("coroutines", function()
  local function producer(n)
    return coroutine.wrap(function() for i = 1, n do coroutine.yield(i * i % 1013) end end)
  end
  local sum = 0
  for i = 1, 300 * scale do
    for v in producer(i) do sum = bxor(rol(sum, 1), v) end
  end
  return sum
end)

ffi.cdef [[
typedef struct { int32_t a; uint8_t b; double c; int64_t d; } record;
void qsort(void *base, size_t count, size_t size, int (*compare)(const int32_t *, const int32_t *));
void *memcpy(void *to, const void *from, size_t size);
size_t strlen(const char *text);
]]

part("ffi", function()
  local n = 1000
  local records = ffi.new("record[?]", n)
  for i = 0, 200000 * scale do
    local r = records[i % n]
    r.a = r.a + i
    r.b = r.a
    r.c = r.c * 0.5 + r.b
    r.d = r.d * 6364136223846793005LL + 1442695040888963407LL
  end
  local d, c = 0LL, 0
  for i = 0, n - 1 do
    d, c = d + records[i].d, c + records[i].c
  end
  local ints, copy = ffi.new("int32_t[?]", 3000), ffi.new("int32_t[?]", 3000)
  for i = 0, 2999 do ints[i] = random() end
  local compare = ffi.cast("int (*)(const int32_t *, const int32_t *)", function(x, y)
    return x[0] < y[0] and -1 or x[0] > y[0] and 1 or 0
  end)
  ffi.C.qsort(ints, 3000, 4, compare)
  compare:free()
  ffi.C.memcpy(copy, ints, 12000)
  local sum = 0
  for i = 0, 2999 do sum = bxor(rol(sum, 3), copy[i]) end
  for i = 1, 100000 * scale do sum = sum + tonumber(ffi.C.strlen("kvmkit")) end
  local u = 1ULL
  for i = 1, 100000 * scale do u = u * 3ULL + i; u = u / 2ULL + u % 1000007ULL end
  return tostring(d), ("%.17g"):format(c), sum, tostring(u)
end)

part("garbage", function()
  local keep, sum = {}, 0
  local weak = setmetatable({}, { __mode = "k" })
  for i = 1, 300000 * scale do
    local node = { i, tostring(i), { next = keep[i % 100] and keep[i % 100][1] } }
    weak[node] = i
    keep[i % 100] = node
    sum = (sum + #node[2] + (node[3].next or 0)) % 1000000007
  end
  return sum
end)

for _, p in ipairs(parts) do print(p[1], p[2]()) end
