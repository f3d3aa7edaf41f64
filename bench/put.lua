-- wrk: PUT values that differ from request to request to random keys; the totals as one line at the end.
local head, prefix, keys, size = {}, "", 1, 1
local n, salt, rest = 0, 0, ""

function init(args)
  head["X-Consul-Token"] = args[1]
  prefix, keys, size = args[2], tonumber(args[3]), tonumber(args[4])
  salt = tonumber(args[5])
  math.randomseed(salt)
  rest = string.rep("x", size - 20)
end

function request()
  n = n + 1
  return wrk.format("PUT", prefix .. math.random(0, keys - 1), head, string.format("%010d%010d", salt, n) .. rest)
end

function done(summary, latency, requests)
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status
    + summary.errors.timeout
  print(string.format("TOTALS %d %d %d %f %f", summary.requests, summary.duration, failed,
    latency:percentile(50), latency:percentile(99)))
end
