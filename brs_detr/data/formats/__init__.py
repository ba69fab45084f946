"""Importers of other dataset formats: Pascal VOC and YOLO."""
