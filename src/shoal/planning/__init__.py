"""What a layout will cost before it runs: devices, time, memory, and the search for the best one. No torch in here."""
