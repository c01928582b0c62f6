"""All limits and time constants of the streams and of control, in one place. Sizes in bytes, times in seconds."""

PROTOCOL_VERSION = 2
PROTOCOL_VERSIONS = (1, 2)  # the versions understood

# Bounds of one message.
MAX_HEADER_BYTES = 4 << 20
MAX_ARRAYS = 16_384
MAX_DIMENSIONS = 8
MAX_MAP_LENGTH = 16_384
MAX_SEQUENCE_LENGTH = 65_536
MAX_NESTING = 32
MAX_NAME_LENGTH = 256
MAX_NUMBER = 1 << 62
MAX_SEQUENCE = 1 << 48  # of a record: sums over many lives stay below MAX_NUMBER

# The largest frame that a socket accepts.
MAX_CONTROL_FRAME_BYTES = 64 << 20
MAX_PICTURE_SIDE = 4_096
MAX_EXPERIENCE_FRAME_BYTES = 256 << 20
MAX_SNAPSHOT_FRAME_BYTES = 8 << 30

# Queues, in messages. What does not fit is dropped: records are fetched again from the body that retains them, and
# of snapshots, which are large and sent in parts, only the newest counts. A receiving queue must never be full: it
# holds more than the operating system's buffers of a link, and the thread that empties it never waits.
EXPERIENCE_QUEUE = 100
PARAMETER_QUEUE = 64
SUBSCRIPTION_QUEUE = 10_000
RECEIVING_QUEUE = 100_000
CONTROL_QUEUE = 1_000
METRICS_QUEUE = 20_000

# What a stream's connection has on its way, at most; on Linux twice that. A larger amount leaves the processor's caches
# between two processes of one host: without a limit it took a third longer. Over 100 ms there and back it is 8 MB/s.
SEND_BUFFER_BYTES = 400_000

# The learning record grows for months: at this interval it gets those values of `ami status` that have changed.
STATISTICS_INTERVAL = 60.0

# Links. A peer that is silent for LINK_TIMEOUT is disconnected by ZMTP and reconnects, and so is one whose frame takes
# longer than that: on a line of 1 MB/s frames of 5 MB get through.
LINK_HEARTBEAT = 0.5
LINK_TIMEOUT = 5.0
HANDSHAKE_TIMEOUT = 3.0
RECONNECT_FIRST = 0.1
RECONNECT_LONGEST = 1.0

# Services. Heartbeats go both ways; a service that is silent for SERVICE_TIMEOUT counts as lost.
SERVICE_HEARTBEAT = 0.5
SERVICE_TIMEOUT = 3.0
NAME_CONFLICT_PATIENCE = 8.0

# How long a service that ends waits for its threads to send what they have: at idle priority they may lack a core.
CLOSING = 10.0

# Commands. One that was under way for longer, e.g. while the controller's process was stopped, is not executed.
STALE_COMMAND = 5.0

# Rates per second and bursts allowed to one key at a hub with keys. Excess messages are dropped, connections delayed.
CONTROL_RATE, CONTROL_BURST = 2_000.0, 5_000.0
CONNECTION_RATE, CONNECTION_BURST = 100.0, 300.0

# How many of each a system may have; further names are refused.
MOST_MEMBERS = 256
MOST_BODIES = 64
BODY_IS_GONE = 600.0  # seconds of silence after which another may take its place
MOST_MODELS = 64

# Snapshots are sent in parts, so that the hub forwards the first while the next is still being sent.
SNAPSHOT_PART_BYTES = 8 << 20
SNAPSHOT_PARTS = 16

# Experience batches: whichever limit is reached first closes one. In a small ring batches have fewer bytes.
BATCH_RECORDS = 256
BATCH_BYTES = 4 << 20
BATCH_AGE = 0.1
SENT_IN_PLACE_BYTES = 1 << 20  # smaller frames are copied: telling that one has been sent takes as long

# Experience that waits: in the body before it is sent, in a trainer before it is taken into the buffer, and there
# ahead of a gap that is being filled. Records in a neighbour's memory are copied just ahead of use, while they are
# still in the cache; announcements of more of them wait as messages. The memory of a body that announces none for so
# long is released; a body that is out of reach is tried again after REACH_AGAIN.
UNSENT_RECORDS = 1_000
UNTAKEN_BYTES = 32 << 20
BATCH_OVERHEAD_BYTES = 4 << 10  # of a waiting batch: its own objects, besides its arrays
AHEAD_BYTES = 32 << 20
COPIED_AHEAD_BYTES = 2 << 20
UNREAD_MESSAGES = 4_096
UNREAD_RINGS = 4
SILENT_BODY = 60.0
REACH_AGAIN = 60.0

# Fetching missing records: the largest answer, and how long after the last part of one it is requested again.
EXTENT_INTERVAL = 0.5
FETCH_BYTES = 16 << 20
FETCH_BATCHES = 64
PLACES_SPANS = MAX_ARRAYS + 1
UNANSWERED_FETCHES = 64
FETCH_PATIENCE = 2.0
FETCH_LONGEST_PATIENCE = 30.0
FETCH_PAUSE = 0.2

# Checkpoints. Their files travel in pieces of STATE_CHUNK bytes, each on request; a request without an answer is
# repeated.
MAX_STATE_HEADER_BYTES = 64 << 20
MOST_STATE_FILES = 256
STATE_CHUNK = 4 << 20
CHUNK_PATIENCE = 3.0
CUT_PATIENCE = 30.0
