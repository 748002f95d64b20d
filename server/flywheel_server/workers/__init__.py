"""A server of several processes on one port, for engines that live elsewhere.

The process that the user has started is the parent. It makes no object of gRPC. It reserves the port, starts the workers, and
replaces those that die. Each worker is a whole server with an engine of its own. The parent has the one admission and
the one health of all.

    port          reserves the port that the workers share
    wire          the lines that parent and workers send one another
    parent        starts the workers, replaces them, and stops them
    shared_calls  what one worker's calls hold of the admission of all, in the parent
    link          the worker's end: an admission control, health and counts that ask the parent

The program that a worker runs is `flywheel_server.worker`, because it loads a whole server.
"""
