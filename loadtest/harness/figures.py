"""Numbers: medians, how far rounds lie apart, differences; and how they are written."""
import statistics

PERCENTILES = ("p50", "p99", "p999")


def median(values):
    """Of those that are there; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def spread(values):
    """How far the rounds lie apart: (largest - smallest) / median."""
    known = [value for value in values if value is not None]
    middle = median(known)
    return (max(known) - min(known)) / middle if middle else None


def summary(rounds):
    """What rounds (dicts of numbers, of dicts of numbers, or None) say together: medians, and spreads under `spread`."""
    whole, spreads = {}, {}
    for name in dict.fromkeys(name for figures in rounds for name in figures):
        values = [figures.get(name) for figures in rounds]
        if any(isinstance(value, dict) for value in values):
            parts = summary([value for value in values if isinstance(value, dict)])
            parts.pop("spread")
            whole[name] = parts
        elif name in ("failed", "aborted"):
            whole[name] = sum(value or 0 for value in values)
        elif any(isinstance(value, str) for value in values):
            whole[name] = next(value for value in values if isinstance(value, str))
        else:
            whole[name], spreads[name] = median(values), spread(values)
    return {**whole, "spread": spreads}


def ratio(value, other):
    return value / other if value is not None and other else None


def added(latency, direct):
    """Percentiles less those of the direct way at the same rate. Below zero it is noise, and shown."""
    if not latency or not direct:
        return None
    return {name: latency[name] - direct[name] for name in PERCENTILES if latency.get(name) is not None and direct.get(name) is not None}


def short(value, digits=3):
    """A number with about that many digits that count; whole numbers as they are, and a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{min(digits - whole, digits)}f}"
