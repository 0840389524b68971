"""Plots as SVG text: bars and lines, for light and for dark pages."""
import math
from xml.sax.saxutils import escape

# told apart by the colour-blind too (Okabe and Ito)
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#999999", "#b8a900")
STYLE = """text{font:12px system-ui,sans-serif;fill:#24292f;stroke:#fff;stroke-width:3px;paint-order:stroke}
.title{font-size:15px;font-weight:600}.faint{fill:#6e7781}line{stroke:#d0d7de}.mark{stroke:#6e7781}rect.page{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#e6edf3;stroke:#0d1117}.faint{fill:#8b949e}line{stroke:#30363d}.mark{stroke:#8b949e}rect.page{fill:#0d1117}}"""
WIDTH, LEFT, BAR = 780, 220, 14


def page(width, height, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">\n'
            f'<style>{STYLE}</style>\n<rect class="page" width="{width}" height="{height}"/>\n' + "\n".join(parts) + "\n</svg>\n")


def text(x, y, said, kind="", anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(str(said))}</text>'


def line(x1, y1, x2, y2, kind=""):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def colours(names):
    """A colour for each; the same in all plots that are given the same names."""
    return {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(dict.fromkeys(names))}


def bars(title, names, groups, limit):
    """Bars lying below each other: group → name → value. One that is longer than `limit` is cut there; its number says how long it is."""
    of = colours(names)
    scale = (WIDTH - LEFT - 60) / limit
    parts, y = [text(16, 26, title, "title")], 48
    top = y
    for group, values in groups.items():
        parts.append(text(16, y + 12, group))
        for name, value in values.items():
            long = min(value, limit) * scale
            parts += [text(LEFT - 8, y + 11, name, "faint", "end"), f'<rect x="{LEFT}" y="{y}" width="{long:.1f}" height="{BAR - 2}" fill="{of[name]}"/>',
                      text(LEFT + long + 5, y + 11, f"{value:.2f}" + (" ▸" if value > limit else ""))]
            y += BAR
        y += 12
    parts.insert(1, line(LEFT + scale, top - 6, LEFT + scale, y - 8, "mark"))
    return page(WIDTH, y + 8, parts)


def lines(title, along, names, panels):
    """Panels side by side: panel → name → [(x, y)]. x and y grow by powers; what is below 1 lies on the floor."""
    of = {name: colour for name, colour in colours(names).items() if any(name in lines for lines in panels.values())}
    xs = [x for lines in panels.values() for points in lines.values() for x, _ in points]
    ys = [max(y, 1) for lines in panels.values() for points in lines.values() for _, y in points]
    low, high = 0, max(1, math.ceil(math.log10(max(ys))))
    first, last = math.log10(min(xs)), math.log10(max(xs))
    wide, tall, top = 200, 220, 64
    parts = [text(16, 26, title, "title")]
    for at, (panel, lines) in enumerate(panels.items()):
        left = 76 + at * (wide + 36)
        place = lambda x, y: (left + (wide * (math.log10(x) - first) / (last - first) if last > first else wide / 2),
                              top + tall * (1 - (math.log10(max(y, 1)) - low) / (high - low)))
        parts.append(text(left, top - 12, {"p999": "p99.9"}.get(panel, panel)))
        for power in range(low, high + 1):
            parts += [line(left, place(1, 10 ** power)[1], left + wide, place(1, 10 ** power)[1])]
            parts += [text(left - 6, place(1, 10 ** power)[1] + 4, f"{10 ** power:,}", "faint", "end")] if at == 0 else []
        parts += [text(place(x, 1)[0], top + tall + 18, f"{x:,}", "faint", "middle") for x in sorted(set(xs))]
        for name, points in lines.items():
            ends = [place(x, y) for x, y in sorted(points)]
            parts.append(f'<polyline fill="none" stroke="{of[name]}" stroke-width="2" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in ends)}"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{of[name]}"/>' for x, y in ends]
    parts.append(text(76 + wide / 2, top + tall + 38, along, "faint", "middle"))
    y = top + tall + 62
    for at, (name, colour) in enumerate(of.items()):
        x = 76 + at % 4 * 170
        parts += [f'<rect x="{x}" y="{y + at // 4 * 20 - 10}" width="12" height="12" fill="{colour}"/>', text(x + 18, y + at // 4 * 20, name)]
    return page(WIDTH, y + (len(of) - 1) // 4 * 20 + 18, parts)
