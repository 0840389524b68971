import os, time, unittest

from harness.processes import Failed, Processes, cpu_ns, memory_kb


class Running(unittest.TestCase):
    def test_what_was_started_ends_with_the_context_and_so_does_what_it_started(self):
        with Processes("test") as processes:
            # says the pid of its child, which would outlive it
            child = processes.start("sh", "sh", "-c", "sleep 60 & echo $!; wait", stdout=-1, text=True)
            below = int(child.stdout.readline())
            self.assertTrue(os.path.exists(f"/proc/{below}"))
            child.stdout.close()
        self.assertIsNotNone(child.returncode)
        self.assertTrue(eventually(lambda: not running(below)))
        self.assertFalse(os.path.exists(processes.folder))

    def test_a_command_that_fails_is_told_with_what_it_said(self):
        with Processes("test") as processes:
            with self.assertRaisesRegex(Failed, "sh ended with 3: oh no"):
                processes.run("sh", "sh", "-c", "echo oh no >&2; exit 3")

    def test_a_process_that_ends_is_not_waited_for(self):
        with Processes("test") as processes:
            child = processes.start("sh", "sh", "-c", "echo cannot bind >&2; exit 1")
            with self.assertRaisesRegex(Failed, "cannot bind"):
                processes.wait_until(child, "sh", lambda: False, patience=60)

    def test_time_and_memory_are_read_of_a_process_and_all_below_it(self):
        with Processes("test") as processes:
            child = processes.start("sh", "sh", "-c", "sleep 60 & echo up; wait", stdout=-1, text=True)
            child.stdout.readline()
            alone = memory_kb(child.pid)
            self.assertGreater(cpu_ns(child.pid), 0)
            self.assertGreater(alone, 0)
            self.assertGreaterEqual(memory_kb(child.pid, "VmHWM"), alone)
            child.stdout.close()
        self.assertEqual(cpu_ns(child.pid), 0)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def eventually(true, patience=10):
    deadline = time.monotonic() + patience
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()
