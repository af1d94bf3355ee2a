"""Processes: launching, process groups, agreement between ranks, the device."""
