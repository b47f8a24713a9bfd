"""What a workload comes to on a machine, drawn: tables for a terminal, charts, and the page of `kvoffload report`."""
