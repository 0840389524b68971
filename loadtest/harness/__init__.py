"""What the measuring scripts share. Standard library only, Linux only.

    processes   starts, pins, watches and ends what a run needs
    targets     table of what can be compared: how it is found, installed, started
    workloads   table of what is sent
    tools       wrk, oha and our own `load`: their command lines and what they print
    passes      one measurement of one target: CPU per request, system calls, added latency, idle connections
    figures     medians, spreads, differences
    goals       table of what is to be reached
    report      Markdown and JSON
    plot        SVG
"""
