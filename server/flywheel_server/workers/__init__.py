"""Serves from several processes on one port. This helps if the engine runs outside these processes.

The process that the user has started is the parent. It uses no gRPC itself. It reserves the port, starts the workers, and
replaces workers that die. Each worker is a complete server with an `Engine` of its own. All workers share the admission
control, the quotas and the health in the parent.

    port              reserves the port that the workers share
    wire              the messages between parent and workers
    parent            in the parent: starts, replaces and stops the workers
    process           in the parent: one worker's process, and what the worker has reported
    shared_calls      in the parent: the places in the queue and the quotas that the calls of one worker hold
    metrics           in the parent: the metrics of all workers together
    link              in a worker: the connection to the parent
    shared_admission  in a worker: an admission control that asks the parent

The program that a worker runs is `flywheel_server.worker`, because it loads a whole server.
"""
