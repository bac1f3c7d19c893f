// The waves of a unit. Also included by the host code that launches them: constexpr, no includes.
#pragma once

namespace mk {

// Where service waves begin among the waves of a unit, and how many waves there are. Registers go from some waves to others by
// fours: where stream waves are no fours, a feed wave comes next and not last, and waves that do nothing fill up its four.
constexpr int first_service_wave(int stream_waves, int feed_waves) {
  return feed_waves == 0 || stream_waves % 4 == 0 ? stream_waves : (stream_waves + feed_waves + 3) / 4 * 4;
}
constexpr int waves_of_unit(int stream_waves, int service_waves, int feed_waves) {
  const int first = first_service_wave(stream_waves, feed_waves);
  return first + service_waves + (first == stream_waves ? feed_waves : 0);
}

}  // namespace mk
