"""Audit: who asked what and what was answered, written to devices before the answer leaves.

``entries`` makes the lines, ``device`` writes them in order without holding up the event loop, ``broker`` decides when
a request may go on, ``table`` keeps the devices in the store, ``registry`` is what the rest of the server uses. A sink
(``file_sink``, ``socket_sink``, ``syslog_sink``) is where the bytes go.
"""
