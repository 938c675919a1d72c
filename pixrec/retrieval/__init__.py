"""Search among the vectors of an index: exact or approximate, filtered, in shards; and a choice of what was found."""
