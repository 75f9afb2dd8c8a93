// The part of the tracker that notes what the picture needs and rrweb does not
// record.
