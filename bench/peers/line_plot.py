"""Lines over a grid, drawn as SVG: what depth_plot.py, bench/gpu/latency.py and bench/serving/cache_budget.py share."""

import math
from xml.sax.saxutils import escape

COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#b45309", "#334155")
WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 40, 52


def fit(points):
    """(slope, intercept, R squared) of the straight line through (x, y)."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = (sum((x - mean_x) * (y - mean_y) for x, y in points) /
             sum((x - mean_x) ** 2 for x, _ in points))
    intercept = mean_y - slope * mean_x
    scatter = sum((y - mean_y) ** 2 for _, y in points)
    rest = sum((y - slope * x - intercept) ** 2 for x, y in points)
    return slope, intercept, 1 - rest / scatter if scatter > 0 else 1.0


def _step(span):
    """A round distance of grid lines: about six of them."""
    power = 10 ** math.floor(math.log10(span / 6))
    return power * min((1, 2, 5, 10), key=lambda m: abs(span / 6 - m * power))


def _grid(end):
    step = _step(end)
    return [i * step for i in range(math.floor(end * 1.0001 / step) + 1)]


class Plot:
    def __init__(self, max_x, max_y, title):
        self.max_x, self.max_y = max_x, max_y
        self.parts = [f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>']

    def x(self, value):
        return LEFT + value / self.max_x * (WIDTH - LEFT - RIGHT)

    def y(self, value):
        return HEIGHT - BOTTOM - value / self.max_y * (HEIGHT - TOP - BOTTOM)

    def line(self, a, b, style):
        self.parts.append(f'<line x1="{self.x(a[0]):.1f}" y1="{self.y(a[1]):.1f}" '
                          f'x2="{self.x(b[0]):.1f}" y2="{self.y(b[1]):.1f}" {style}/>')

    def text(self, x, y, text, style=""):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" {style}>{escape(text)}</text>')

    def axes(self, x_label="tokens of context", y_label="ms per decoded token"):
        grid = 'stroke="#cbd5e1" stroke-width="1"'
        for value in _grid(self.max_x):
            self.line((value, 0), (value, self.max_y), grid)
            self.text(self.x(value), HEIGHT - BOTTOM + 18, f"{value:.0f}", 'text-anchor="middle"')
        for value in _grid(self.max_y):
            self.line((0, value), (self.max_x, value), grid)
            self.text(LEFT - 8, self.y(value) + 4, f"{value:g}", 'text-anchor="end"')
        self.text((LEFT + WIDTH) / 2, HEIGHT - 12, x_label, 'text-anchor="middle"')
        self.text(LEFT - 50, TOP - 4, y_label)

    def svg(self):
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
                f'font-family="sans-serif" fill="#0f172a">\n<rect width="{WIDTH}" height="{HEIGHT}" '
                'fill="white"/>\n' + "\n".join(self.parts) + "\n</svg>\n")
