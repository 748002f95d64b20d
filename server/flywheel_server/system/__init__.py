"""What the server asks of the operating system, and how it deals with what the system does to a process.

    cores          how many cores the process may use
    memory         how much memory the process may use
    cgroups        the limits that Linux sets for a group of processes
    heap           freed memory, given back to the system
    descriptors    how many files and sockets the process may have open
    shortage       errors that say that the system has run out of something
    signals        signals that stop the process or ask it for its stacks
    output         standard output and standard error, written without waiting for a reader
    regular_files  files that are read as a whole
    reloading      files that are read again when they change

Nothing in this folder knows what a generation is.
"""
