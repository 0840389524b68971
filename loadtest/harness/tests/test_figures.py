import unittest

from harness.figures import added, median, ratio, short, spread, summary


class Figures(unittest.TestCase):
    def test_median_leaves_out_what_is_not_there(self):
        self.assertEqual(median([3.0, None, 1.0, 2.0]), 2.0)
        self.assertIsNone(median([None]))

    def test_spread_is_the_range_over_the_median(self):
        self.assertAlmostEqual(spread([9.0, 10.0, 12.0]), 0.3)
        self.assertIsNone(spread([]))

    def test_summary_takes_medians_at_every_depth_and_sums_failures(self):
        rounds = [{"cpu_us": 1.0, "failed": 0, "latency_us": {"p50": 5.0}}, {"cpu_us": 3.0, "failed": 2, "latency_us": {"p50": 7.0}}, {"cpu_us": 2.0, "failed": 1}]
        whole = summary(rounds)
        self.assertEqual(whole["cpu_us"], 2.0)
        self.assertEqual(whole["failed"], 3)
        self.assertEqual(whole["latency_us"], {"p50": 6.0})
        self.assertAlmostEqual(whole["spread"]["cpu_us"], 1.0)

    def test_summary_keeps_the_first_text(self):
        self.assertEqual(summary([{"first_failure": None}, {"first_failure": "status 500"}])["first_failure"], "status 500")

    def test_added_latency_is_what_lies_above_the_direct_way(self):
        self.assertEqual(added({"p50": 30.0, "p99": 90.0}, {"p50": 10.0, "p99": 95.0, "p999": 1.0}), {"p50": 20.0, "p99": -5.0})
        self.assertIsNone(added({"p50": 1.0}, None))

    def test_ratio_of_nothing_is_nothing(self):
        self.assertIsNone(ratio(1.0, None))
        self.assertIsNone(ratio(None, 2.0))
        self.assertEqual(ratio(1.0, 2.0), 0.5)

    def test_numbers_are_written_with_the_digits_that_count(self):
        said = {0.2331: "0.233", 1.0: "1.00", 12.34: "12.3", 123.4: "123", 20511.0: "20511", 0: "0", 1380: "1380", None: "–", -12.34: "-12.3"}
        for value, text in said.items():
            self.assertEqual(short(value), text)
