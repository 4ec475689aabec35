"""Each finding staged by a real fault, and what gketrace says of it.

``python -m e2e.scenarios`` brings up labs, stages each fault in turn, sends real traffic to show
the symptom, asks gketrace, removes the fault and asks again.  It prints a table, a confusion
matrix, and one JSON object as its last line.

::

    model.py        Scenario: code, how it is staged, what traffic shows, what may come along
    stage.py        Stage: a lab, changes that undo themselves, checks in this process
    services.py     scenarios of the family Services; connections.py and path.py likewise
    balancers.py    those of load balancers' health checks
    snapshots.py    what this kernel lacks or what is proprietary: faults put into what was read
    baseline.py     reads `baseline`, the fixture's own true faults
    paste.py        runs the command that a finding gives
    run.py          runs scenarios, pairs of them, and what the baseline says
"""
