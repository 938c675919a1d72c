"""Search among the vectors of an index: exact or approximate, filtered, in shards; and how what was found is ranked."""
