import contextlib, dataclasses, io, unittest, unittest.mock
from xml.etree import ElementTree

from harness import goals, passes, plot, report, rounds, workloads
from harness.processes import Failed
from harness.targets import BY_NAME as TARGETS

SVG = "{http://www.w3.org/2000/svg}"


def closed(cpu, **more):
    return {"closed": {"cpu_us": cpu, "rate": 1000.0, "failed": 0, "peak_rss_kb": 2048, "spread": {"cpu_us": 0.1}, **more}}


def empty():
    return {"command": "loadtest/compare.py", "commit": "0123456789abcdef", "when": "2026-01-31T09:30:00Z", "versions": {"nginx": "1.22"}, "workloads": {},
            "machine": {"cpu": "a CPU", "allowed_cores": 2, "kernel": "6.1", "load_before": [0.25, 0.1, 0.0]}, "settings": {"one_core": True, "rounds": 3, "seconds": 4}}


def results():
    at_rates = {"500": {"rate": 500.0, "latency_us": {"p50": 30.0}, "added_us": {"p50": 20.0, "p99": 40.0, "p999": 900.0}},
                "2000": {"rate": 1999.0, "unsent": 0.2, "latency_us": {"p50": 33.0}, "added_us": {"p50": 23.0, "p99": -4.0, "p999": 70.0}}}
    return {**empty(), "workloads": {"small-json": {"summary": "a <small> one", "targets": {
        "direct": {"rates": {"500": {"rate": 500.0, "latency_us": {"p50": 10.0}}}, "closed": {"rate": 5000.0, "failed": 0}},
        "vllm-proxy": {**closed(6.0), "rates": at_rates, "system_calls": 0.25}, "nginx": closed(12.0), "haproxy": closed(10.0), "vllm-router": closed(100.0)}}}}


class Tables(unittest.TestCase):
    def test_a_table_has_a_row_per_target_and_ratios_to_nginx(self):
        said = report.markdown(results())
        self.assertIn("| vllm-proxy | 6.00 ±5 % | 0.500 | 1000 | 0.250 | 2.0 | 0 |", said)
        self.assertIn("| vllm-router | 100 ±5 % | 8.33 |", said)
        self.assertIn("| 500 | vllm-proxy | 500 | 20.0 / 40.0 / 900 |", said)
        self.assertIn("| 2000 | vllm-proxy | 1999 | ≥ 23.0 / -4.00 / 70.0 |", said)

    def test_every_row_of_a_table_has_as_many_cells_as_its_head(self):
        whole = results()
        whole["workloads"]["sse"] = {"summary": "s", "targets": {"nginx": closed(
            200.0, cpu_us_per_event=1.0, events_per_second=2e5, event_delay_us={"p50": 3.0, "p99": 9.0}, first_event_us={"p50": 1.0, "p99": 2.0}), "direct": closed(None)}}
        whole["workloads"]["idle"] = {"summary": "i", "targets": {"nginx": {"idle": {"idle": 10_000, "bytes_per_connection": 700.0, "start_rss_kb": 3000, "peak_rss_kb": 9000}}}}
        widths = []
        for line in report.markdown(whole).split("\n"):
            widths = [*widths, line.count("|")] if line.startswith("|") else []
            self.assertEqual(len(set(widths)), min(len(widths), 1), line)

    def test_a_run_begins_with_how_it_was_made_and_all_targets_at_a_glance(self):
        lines = report.markdown(results()).split("\n")
        self.assertEqual(lines[0], "`loadtest/compare.py`")
        self.assertIn("a CPU, 2 cores, Linux 6.1, load 0.25 before; commit 0123456789ab, 2026-01-31; 3 rounds of 4 s, all on one core. nginx 1.22", lines)
        self.assertIn("| small-json | 6.00 (0.50) | 12.0 | 10.0 (0.83) | 100 (8.3) |", lines)

    def test_failures_are_said_below_the_table(self):
        whole = results()
        whole["workloads"]["small-json"]["targets"]["nginx"]["closed"] |= {"failed": 7, "first_failure": "status 500"}
        self.assertIn("nginx: 7 failed (status 500)", report.markdown(whole))

    def test_goals_are_met_by_ratio_or_not_measured(self):
        lines = goals.table(results())
        self.assertEqual(len(lines), 2 + len(goals.GOALS))
        self.assertIn("| small JSON, CPU per request, × nginx | 0.500 | 0.500 | met |", lines)
        self.assertIn("| small JSON, CPU per request, × haproxy | 0.500 | 0.600 | **not met** |", lines)
        self.assertIn("| 1 MB body, CPU per request, × nginx | 0.700 | – | not measured |", lines)

    def test_goals_name_workloads_targets_and_rates_that_exist(self):
        for goal in goals.GOALS:
            others = [goal.against] if goal.against else []
            for target, workload in [(goal.target, goal.workload), *others]:
                self.assertIn(target, TARGETS)
                self.assertIn(workload, workloads.BY_NAME)
                if goal.figure[0] == "rates":
                    self.assertIn(int(goal.figure[1]), workloads.BY_NAME[workload].rates)


class Plots(unittest.TestCase):
    def test_plots_are_well_formed(self):
        made = report.plots(results())
        self.assertEqual(set(made), {"cpu.svg", "latency-small-json.svg"})
        for svg in made.values():
            self.assertEqual(ElementTree.fromstring(svg).tag, f"{SVG}svg")

    def test_a_bar_that_is_cut_says_how_long_it_is(self):
        drawn = ElementTree.fromstring(plot.bars("t", ["near", "far"], {"g": {"near": 1.0, "far": 9.5}}, limit=2.0))
        bars = [float(one.get("width")) for one in drawn.iter(f"{SVG}rect") if one.get("class") != "page"]
        self.assertAlmostEqual(bars[1], 2 * bars[0], delta=0.2)
        self.assertIn("9.50 ▸", [one.text for one in drawn.iter(f"{SVG}text")])

    def test_names_are_escaped(self):
        self.assertIn("a &lt;b&gt; &amp; c", plot.bars("a <b> & c", ["x"], {"g": {"x": 1.0}}, 2.0))

    def test_a_line_of_one_point_is_drawn(self):
        drawn = ElementTree.fromstring(plot.lines("t", "x", ["a"], {"p50": {"a": [(500, 0.2)]}}))
        self.assertEqual(len(list(drawn.iter(f"{SVG}circle"))), 1)


class Plans(unittest.TestCase):
    def test_each_round_begins_with_another_target(self):
        self.assertEqual([rounds.turned("abc", at)[0] for at in range(4)], ["a", "b", "c", "a"])
        self.assertEqual(sorted(rounds.turned("abc", 2)), ["a", "b", "c"])
        self.assertEqual(rounds.turned([], 1), [])

    def test_workloads_in_a_group_share_their_setup_and_none_is_lost(self):
        grouped = list(rounds.groups(workloads.WORKLOADS))
        self.assertEqual(sorted(one.name for group in grouped for one in group), sorted(workloads.BY_NAME))
        for group in grouped:
            self.assertEqual(len({one.setup for one in group}), 1)

    def test_the_direct_way_is_left_out_where_memory_is_counted(self):
        self.assertNotIn("direct", [target.name for target in rounds.able(TARGETS.values(), workloads.BY_NAME["idle"])])
        self.assertIn("direct", [target.name for target in rounds.able(TARGETS.values(), workloads.BY_NAME["small-json"])])

    def test_a_target_is_left_out_of_what_it_cannot_do(self):
        self.assertNotIn("vllm-router", [target.name for target in rounds.able(TARGETS.values(), workloads.BY_NAME["two-shards"])])


class Measuring(unittest.TestCase):
    def test_a_target_that_fails_is_said_and_the_others_are_measured(self):
        def load(_, running, workload, seconds, rate=None, **how):
            if running.name == "broken":
                raise Failed("it fell over")
            return {"requests": 10, "rate": 10.0, "seconds": 1.0, "failed": 0, "latency_us": {"p50": 5.0, "p99": None} if rate else None}

        running = {name: passes.Running(name, "127.0.0.1:1") for name in ("direct", "broken", "whole")}
        workload = dataclasses.replace(workloads.BY_NAME["small-json"], rates=(100,))
        known, said = empty(), io.StringIO()
        with unittest.mock.patch.object(passes, "loop", load), contextlib.redirect_stderr(said):
            rounds.measure(None, running, workload, rounds.Manner(rounds=2, seconds=1, system_calls=False), rounds.Progress(10), known)
        of = known["workloads"]["small-json"]["targets"]
        self.assertEqual(of["broken"]["problem"], "it fell over")
        self.assertEqual(of["whole"]["closed"]["requests"], 10)
        self.assertEqual(of["whole"]["rates"]["100"]["added_us"], {"p50": 0.0})
        self.assertIn("broken: it fell over", report.markdown(known))
        self.assertIn("round 2 of 2", said.getvalue())

    def test_a_stream_that_its_client_leaves_is_an_exchange(self):
        self.assertEqual(passes.counts({"requests": 1, "aborted": 9, "events": 50}, workloads.BY_NAME["abort"]), (10, 50))
        self.assertEqual(passes.counts({"requests": 3}, workloads.BY_NAME["sse"]), (3, 600))
        self.assertEqual(passes.counts({"requests": 3}, workloads.BY_NAME["small-json"]), (3, 0))
