import json, unittest

from harness.passes import read_perf, read_strace
from harness.processes import Failed
from harness.tools import read_oha, read_wrk

WRK = """Running 1s test @ http://127.0.0.1:1/
  1 threads and 32 connections
  21362 requests in 1.00s, 9.12MB read
RESULT 21362 1000500 3 1400 1600 2500 4000 9000
"""
OHA = {
    "summary": {"requestsPerSec": 499.4, "total": 2.0},
    "latencyPercentiles": {"p50": 0.000134, "p90": 0.002, "p99": 0.0115, "p99.9": 0.0242, "p99.99": None},
    "statusCodeDistribution": {"200": 990, "503": 7},
    "errorDistribution": {"connection closed": 3},
}
STRACE = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 61.11    0.000100           1       100         3 recvfrom
 38.89    0.000063           1        48           sendto
------ ----------- ----------- --------- --------- ----------------
100.00    0.000163           1       148         3 total
"""


class Parsing(unittest.TestCase):
    def test_wrk_is_read_from_the_line_its_script_prints(self):
        said = read_wrk(WRK)
        self.assertEqual((said["requests"], said["failed"], said["latency_us"]["p999"]), (21362, 3, 4000.0))
        self.assertAlmostEqual(said["rate"], 21351.3, places=1)

    def test_wrk_without_a_result_is_a_failure(self):
        with self.assertRaises(Failed):
            read_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")

    def test_oha_counts_what_is_not_2xx_as_failed(self):
        said = read_oha(json.dumps(OHA), 500, 2)
        self.assertEqual((said["requests"], said["failed"], said["offered_rate"], said["unsent"]), (990, 10, 500, 0.0))
        self.assertAlmostEqual(said["latency_us"]["p99"], 11_500)

    def test_oha_may_know_no_percentiles(self):
        said = read_oha(json.dumps({**OHA, "latencyPercentiles": dict.fromkeys(OHA["latencyPercentiles"])}), 500, 2)
        self.assertEqual(said["latency_us"], {})

    def test_requests_that_oha_has_not_sent_are_missed(self):
        self.assertAlmostEqual(read_oha(json.dumps(OHA), 500, 4)["unsent"], 0.5)

    def test_strace_is_read_from_its_sum(self):
        self.assertEqual(read_strace(STRACE), 148)
        self.assertIsNone(read_strace("strace: attach: ptrace(PTRACE_SEIZE, 1): Operation not permitted\n"))

    def test_perf_is_read_from_its_count_of_system_calls(self):
        self.assertEqual(read_perf("# started on Sun\n\n4978,,raw_syscalls:sys_enter,1003,100.00,,\n"), 4978)
        self.assertIsNone(read_perf("<not supported>,,raw_syscalls:sys_enter,0,100.00,,\n"))
