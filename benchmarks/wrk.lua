-- Loads one URL with one POST body over kept-alive connections (see load.py).
--
-- Timed are whole waves: from the moment when `concurrency` requests are complete to one when
-- a multiple of `concurrency` more are. Requests that are cut off at the end count for nothing
-- and the first wave, which starts cold, neither. Tokens are the server's own count in the
-- last event of each stream; the number of events is counted beside it.
local ffi = require("ffi")
ffi.cdef [[
typedef struct { long sec; long nsec; } bench_time;
int clock_gettime(int clock, bench_time *now);
]]
local at = ffi.new("bench_time[1]")
local function now()
  ffi.C.clock_gettime(1, at) -- CLOCK_MONOTONIC
  return tonumber(at[0].sec) + tonumber(at[0].nsec) * 1e-9
end

local concurrency, seconds, waves
local complete, failed, tokens, events, began = 0, 0, 0, 0, nil
local finished = false

function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method = "POST"
  wrk.body = file:read("*a")
  file:close()
  wrk.headers["Content-Type"] = "application/json"
  concurrency, seconds, waves = tonumber(args[2]), tonumber(args[3]), tonumber(args[4])
  local length = tonumber(args[5])
  if length > 0 then
    -- A prompt of its own for each request, so that no prefix cache helps.
    math.randomseed(os.time() + tonumber(args[2]))
    local before, after = wrk.body:match('^(.*)"@PROMPT@"(.*)$')
    local words = {}
    for word in (args[6] or ""):gmatch("%a+") do words[#words + 1] = word end
    request = function()
      local parts = {}
      for n = 1, length do
        parts[n] = #words > 0 and words[math.random(#words)] or math.random(1000, 30000)
      end
      local prompt = "[" .. table.concat(parts, ",") .. "]"
      if #words > 0 then prompt = '"' .. table.concat(parts, " ") .. '"' end
      return wrk.format(nil, nil, nil, before .. prompt .. after)
    end
  end
end

local function events_in(body)
  local n, from = 0, 1
  while true do
    local found = body:find("data: {", from, true)
    if not found then return n end
    n, from = n + 1, found + 7
  end
end

function response(status, headers, body)
  if finished then return end
  complete = complete + 1
  local got = body:sub(-600):match('"completion_tokens":%s*(%d+)')
  if status ~= 200 or not got or not body:find("data: [DONE]", 1, true) then
    failed = failed + 1
    if failed == 1 then io.write("FIRST_FAILURE ", status, " ", body:sub(-300):gsub("%s+", " "), "\n") end
  elseif began then
    tokens = tokens + tonumber(got)
    events = events + events_in(body)
  end
  if complete == concurrency then began = now() end
  if complete > concurrency and complete % concurrency == 0 then
    local elapsed = now() - began
    if elapsed >= seconds and complete >= concurrency * (waves + 1) then
      finished = true
      io.write(string.format("RESULT %d %d %d %d %.6f\n", complete - concurrency, failed, tokens, events, elapsed))
      io.flush()
      wrk.thread:stop()
    end
  end
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("ERRORS %d %d %d %d\n", e.connect, e.read, e.write, e.timeout))
  io.flush()
end
